"""Send webhooks: signed, to public addresses only, retried until delivered."""

import asyncio
import base64
import contextlib
import hashlib
import logging
import time

import aiohttp
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sa3dist.data.remote.public_addresses import public_socket
from sa3dist.errors import SA3DistError, first_line, printable
from sa3dist.serve import wire
from sa3dist.serve.keys import Signer
from sa3dist.serve.outbox import Delivery, Outbox
from sa3dist.serve.service import Service
from sa3dist.serve.tables import DatabaseAway

log = logging.getLogger(__name__)

# The hosted endpoint tries ten times within two hours.
MAX_TRIES, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10, 10.0, 1800.0
TRY_SECONDS, LOOK_SECONDS = 15.0, 1.0
MOST_AT_A_TIME = 200


def public_keys(signer: Signer) -> dict:
    """The document at /.well-known/jwks.json."""
    raw = signer.webhook_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    word = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
    return {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": word, "kid": hashlib.sha256(raw).hexdigest()[:16]}]}


def signed_headers(signer: Signer, request_id: str, user_id: str, body: bytes) -> dict[str, str]:
    """Headers with an Ed25519 signature of request id, user id, time and the body's SHA-256, one per line."""
    when = str(int(time.time()))
    text = "\n".join([request_id, user_id, when, hashlib.sha256(body).hexdigest()])
    return {
        "Content-Type": "application/json",
        "X-Fal-Webhook-Request-Id": request_id,
        "X-Fal-Webhook-User-Id": user_id,
        "X-Fal-Webhook-Timestamp": when,
        "X-Fal-Webhook-Signature": signer.webhook_key.sign(text.encode()).hex(),
    }


class Webhooks:
    """Delivers the webhooks in the outbox of a server's database."""

    def __init__(self, service: Service) -> None:
        self._service, self._outbox = service, Outbox(service.store.database)

    async def deliver_all(self) -> None:
        """Deliver for ever."""
        options = {} if self._service.options.allow_private_webhooks else {"socket_factory": public_socket}
        timeout = aiohttp.ClientTimeout(total=TRY_SECONDS)
        connector = aiohttp.TCPConnector(limit=MOST_AT_A_TIME, **options)
        tries: set[asyncio.Task] = set()
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while True:
                due = []
                # Logged once by the snapshot's reader.
                with contextlib.suppress(DatabaseAway):
                    due = await asyncio.to_thread(self._outbox.due, 4 * TRY_SECONDS, MOST_AT_A_TIME - len(tries))
                for delivery in due:
                    # A task of its own: receivers that do not answer must not delay the others.
                    tries.add(task := asyncio.create_task(self._try(session, delivery)))
                    task.add_done_callback(tries.discard)
                if not due:
                    await asyncio.sleep(LOOK_SECONDS)

    async def _try(self, session: aiohttp.ClientSession, delivery: Delivery) -> None:
        # If the database is away, the delivery is due again later.
        with contextlib.suppress(DatabaseAway):
            await self._deliver(session, delivery)

    async def _deliver(self, session: aiohttp.ClientSession, delivery: Delivery) -> None:
        job = await asyncio.to_thread(self._service.store.get, delivery.job_id)
        if job is None:
            return await asyncio.to_thread(self._outbox.failed, delivery, "the job was deleted", None)
        body = wire.webhook_body(self._service, job)
        headers = signed_headers(self._service.signer, job.id, job.key, body)
        try:
            # No redirects: they could lead to another address than the client's.
            async with session.post(delivery.url, data=body, headers=headers, allow_redirects=False) as answer:
                problem = None if 200 <= answer.status < 300 else f"status {answer.status}"
        except (aiohttp.ClientError, SA3DistError, OSError, ValueError, asyncio.TimeoutError) as failure:
            problem = printable(first_line(failure))[:200]
        if problem is None:
            return await asyncio.to_thread(self._outbox.delivered, delivery)
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (delivery.tries - 1), LONGEST_PAUSE_SECONDS)
        again = None if delivery.tries >= MAX_TRIES else pause
        what = "given up" if again is None else f"again in {again:g} s"
        log.warning("webhook", extra={"fields": {"webhook_of": job.id, "problem": problem, "next": what}})
        return await asyncio.to_thread(self._outbox.failed, delivery, problem, again)
