"""Webhooks: a row for each, written when its job ends; sent signed, to public addresses only, until delivered."""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import logging
import time

import aiohttp
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy import select

from sa3dist.data.remote.public_addresses import public_socket
from sa3dist.errors import SA3DistError, first_line, printable
from sa3dist.serve import wire
from sa3dist.serve.keys import Signer
from sa3dist.serve.service import Service, service_of
from sa3dist.serve.tables import Database, DatabaseAway, deliveries, now

log = logging.getLogger(__name__)
routes = APIRouter(tags=["operation"])

# The hosted endpoint tries ten times within two hours.
MAX_TRIES, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10, 10.0, 1800.0
TRY_SECONDS, LOOK_SECONDS = 15.0, 1.0
MOST_AT_A_TIME = 200


@routes.get("/.well-known/jwks.json")
async def public_keys(request: Request) -> Response:
    """The public key for webhook signatures."""
    raw = service_of(request).signer.webhook_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    word = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
    key = {"kty": "OKP", "crv": "Ed25519", "x": word, "kid": hashlib.sha256(raw).hexdigest()[:16]}
    return JSONResponse({"keys": [key]})


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


@dataclasses.dataclass(frozen=True)
class Delivery:
    """One webhook. tries: number of tries, including the current one."""

    id: int
    job_id: str
    url: str
    tries: int


class Outbox:
    """The webhooks of one database. Every method may raise DatabaseAway.

    Delivery is at least once: if a server is killed before ``delivered``, it is repeated.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def due(self, seconds: float, limit: int = 20) -> list[Delivery]:
        """Deliveries to try now. No other server gets them for ``seconds``, the duration of one try."""
        with self._database.writing(alone=True) as connection:
            ready = select(deliveries.c.id).where(deliveries.c.next_try <= now())
            ready = ready.order_by(deliveries.c.next_try).limit(limit)
            ids = list(connection.scalars(ready))
            if not ids:
                return []
            columns = [deliveries.c[field.name] for field in dataclasses.fields(Delivery)]
            claim = deliveries.update().where(deliveries.c.id.in_(ids))
            claim = claim.values(next_try=now() + seconds, tries=deliveries.c.tries + 1).returning(*columns)
            return [Delivery(**row._mapping) for row in connection.execute(claim)]

    def delivered(self, delivery: Delivery) -> None:
        """Record a successful delivery."""
        self._update(delivery, delivered=now(), next_try=None, error=None)

    def failed(self, delivery: Delivery, error: str, again_seconds: float | None) -> None:
        """Record a failed delivery. again_seconds: time until the next try; None: give up."""
        self._update(delivery, error=error, next_try=None if again_seconds is None else now() + again_seconds)

    def _update(self, delivery: Delivery, **values) -> None:
        with self._database.writing() as connection:
            connection.execute(deliveries.update().where(deliveries.c.id == delivery.id).values(values))


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
