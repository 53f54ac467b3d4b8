"""Routes of the queue: submit, run, status, result, cancel, delete, under the hosted endpoint's addresses."""

import asyncio
import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from sa3dist.request.fields import EndpointFields
from sa3dist.serve import wire
from sa3dist.serve.bodies import base_of, blocks
from sa3dist.serve.job import Job
from sa3dist.serve.job_store import RETRIES, QueueFull, Unfinished
from sa3dist.serve.keys import Caller
from sa3dist.serve.logs import read_logs
from sa3dist.serve.service import Service, UnknownRequest, WireError, refusal, refuse_if_full, service_of
from sa3dist.serve.submission import accept, lifetime, refuse_inward
from sa3dist.serve.tables import QUEUED

routes = APIRouter()
NORMAL_PRIORITY, LOW_PRIORITY = 10, 100
KEEP_ALIVE_SECONDS = 15.0
SMALL_BODY_BYTES = 1 << 20
# How long the hosted endpoint keeps a result if it does not store payloads.
UNSTORED_SECONDS = 3600.0
BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": EndpointFields.model_json_schema()}}}
}


def app_of(service: Service, owner: str, name: str) -> str:
    """The application in an address. Raises WireError if this server does not have it."""
    app = f"{owner}/{name}"
    if app not in service.options.apps:
        raise WireError(404, f"Application {app[:200]!r} not found; this server has {', '.join(service.options.apps)}")
    return app


async def submit_job(request: Request, owner: str, name: str) -> Job:
    """Submit a job for the request, or return the job of an equal recent request."""
    service = service_of(request)
    caller, app = service.caller(request), app_of(service, owner, name)
    service.check_space()
    webhook = await _webhook(service, request.query_params.get("fal_webhook"))
    options = _queue_options(request)
    # Received to the disk if it is large: a body that comes slowly must neither fill the memory nor delay others.
    with tempfile.SpooledTemporaryFile(SMALL_BODY_BYTES) as received:
        async for block in blocks(service, request, service.options.max_body_bytes):
            received.write(block)
        async with service.large_bodies if received.tell() > SMALL_BODY_BYTES else contextlib.nullcontext():
            received.seek(0)
            body = await asyncio.to_thread(received.read)
            accepted = await accept(service, caller, body, base_of(request), options["keep_seconds"])
    idempotency_key = request.headers.get("idempotency-key") or accepted.digest
    options |= {"app": app, "key": caller.id, "settings": accepted.settings, "webhook": webhook}
    dedup = hashlib.sha256(json.dumps([caller.id, app, idempotency_key, webhook]).encode()).hexdigest()
    while True:
        try:
            job = await asyncio.to_thread(service.store.submit, accepted.request, dedup=dedup, **options)
        except QueueFull as full:
            await asyncio.to_thread(service.files.delete, *accepted.files)
            raise WireError(429, str(full), headers={"X-Fal-Needs-Retry": "1"}) from full
        # An equal request after replay_seconds is not a repetition: it gets a new job.
        if time.time() - job.created < service.options.replay_seconds:
            break
        dedup = hashlib.sha256(f"{dedup} {job.id}".encode()).hexdigest()
    if job.settings != accepted.settings:
        # An earlier request's job, which reads its own copy of the data.
        await asyncio.to_thread(service.files.delete, *accepted.files)
    service.snapshot.put(job)
    return job


def _queue_options(request: Request) -> dict[str, Any]:
    """Arguments of ``JobStore.submit`` from headers and query. Raises WireError."""
    headers, query = request.headers, request.query_params
    low = headers.get("x-fal-queue-priority", "normal").lower() == "low"
    options: dict[str, Any] = {"priority": LOW_PRIORITY if low else NORMAL_PRIORITY, "retries": _retries(request)}
    timeout = headers.get("x-fal-request-start-timeout") or headers.get("x-fal-request-timeout")
    for key, text, place in (
        ("start_timeout", timeout, ["header", "x-fal-request-timeout"]),
        ("max_queue", query.get("fal_max_queue_length"), ["query", "fal_max_queue_length"]),
    ):
        if text is None:
            continue
        try:
            value = float(text) if key == "start_timeout" else int(text[:12])
        except ValueError:
            value = -1
        if not 0 <= value < 1e9:
            raise WireError(422, [refusal(place, f"{text[:100]!r} is no number, 0 or more")])
        options[key] = value
    keep_seconds = lifetime(headers)
    if headers.get("x-fal-store-io") == "0":
        keep_seconds = min(UNSTORED_SECONDS, keep_seconds or UNSTORED_SECONDS)
    options["keep_seconds"] = keep_seconds
    if (most := request.app.state.service.options.max_queue) is not None:
        options["max_queue"] = min(most, options.get("max_queue", most))
    return options


def _is_yes(text: str) -> bool:
    return text.lower() in ("1", "true", "yes")


def _retries(request: Request) -> int:
    """Number of retries: the smallest of those given for different kinds of failure."""
    if _is_yes(request.headers.get("x-fal-no-retry", "")):
        return 0
    text = request.headers.get("x-fal-retry-config", "{}")
    try:
        numbers = [int(kind["retries"]) for kind in json.loads(text).values()]
        if not all(0 <= number <= 1000 for number in numbers):
            raise ValueError("out of range")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        expected = '{"server_error": {"retries": 3}}, 0..1000'
        place = ["header", "x-fal-retry-config"]
        raise WireError(422, [refusal(place, f"{text[:100]!r} is no budget; expected {expected}")]) from error
    return min(numbers, default=RETRIES)


async def _webhook(service: Service, address: str | None) -> str | None:
    if not address:
        return None
    place = ["query", "fal_webhook"]
    try:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or len(address) > 2000 or "\0" in address:
            raise ValueError("expected an http(s) address")
        if not service.options.allow_private_webhooks:
            await refuse_inward(service, parts.hostname, parts.port or 443)
    except ValueError as error:
        raise WireError(422, [refusal(place, str(error))]) from error
    return address


def _answer(body: Any, code: int, job: Job) -> Response:
    headers = {wire.REQUEST_ID: job.id}
    if isinstance(body, dict) and body.get("error_type"):
        headers["X-Fal-Error-Type"] = body["error_type"]
        if body["error_type"] == "startup_timeout":
            headers["X-Fal-Request-Timeout-Type"] = "user"
    return JSONResponse(body, code, headers)


@routes.get("/{owner}/{name}/requests/{job_id}/status", tags=["queue"])
async def get_status(request: Request, owner: str, name: str, job_id: str, logs: str = "0") -> Response:
    """The status of a request; with logs=1 including the trainer's output so far."""
    service, base = service_of(request), base_of(request)
    job = await service.job(job_id, service.caller(request))
    lines, _ = await asyncio.to_thread(read_logs, job) if _is_yes(logs) else ([], 0)
    return wire.status_answer(job, base, service.snapshot.position(job), lines)


@routes.get("/{owner}/{name}/requests/{job_id}/status/stream", tags=["queue"])
async def stream_status(request: Request, owner: str, name: str, job_id: str, logs: str = "0") -> Response:
    """The status as server-sent events, one for each change, until the request ends."""
    service, base = service_of(request), base_of(request)
    caller = service.caller(request)
    await service.job(job_id, caller)
    refuse_if_full(service.waiters, "open streams")
    events = _events(service, caller, job_id, base, _is_yes(logs))
    return StreamingResponse(events, 200, {wire.REQUEST_ID: job_id, "Cache-Control": "no-cache"}, "text/event-stream")


async def _events(service: Service, caller: Caller, job_id: str, base: str, logs: bool) -> AsyncIterator[str]:
    at, last = 0, None
    async with service.waiters:
        while not service.stopping.is_set():
            refreshed = service.snapshot.refreshed
            try:
                job = await service.job(job_id, caller)
            except WireError:
                # The job was deleted meanwhile. The answer has begun, so it can only end.
                return
            lines = []
            if logs and job.state != QUEUED:
                lines, at = await asyncio.to_thread(read_logs, job, at)
            body = wire.status(job, base, service.snapshot.position(job), lines)
            if lines or {**body, "logs": []} != last:
                last = {**body, "logs": []}
                yield f"data: {json.dumps(body)}\n\n"
            if job.is_finished:
                return
            try:
                await asyncio.wait_for(refreshed.wait(), KEEP_ALIVE_SECONDS)
            except (TimeoutError, asyncio.TimeoutError):
                yield ": keep-alive\n\n"


@routes.get("/{owner}/{name}/requests/{job_id}", tags=["queue"])
@routes.get("/{owner}/{name}/requests/{job_id}/response", tags=["queue"])
async def get_result(request: Request, owner: str, name: str, job_id: str) -> Response:
    """The result of a finished request, or its error."""
    service = service_of(request)
    job = await service.job(job_id, service.caller(request))
    code, body = wire.answer_of(service, job, base_of(request))
    return _answer(body, code, job)


@routes.put("/{owner}/{name}/requests/{job_id}/cancel", tags=["queue"])
async def cancel(request: Request, owner: str, name: str, job_id: str) -> Response:
    """Cancel a request: at once if it is waiting, after saving if it is running."""
    service = service_of(request)
    job = await service.job(job_id, service.caller(request))
    if job.is_finished:
        return JSONResponse({"status": "ALREADY_COMPLETED"}, 400, {wire.REQUEST_ID: job_id})
    job = await asyncio.to_thread(service.store.cancel, job_id)
    if job is None:
        raise UnknownRequest
    service.snapshot.put(job)
    return JSONResponse({"status": "CANCELLATION_REQUESTED"}, 202, {wire.REQUEST_ID: job_id})


@routes.delete("/{owner}/{name}/requests/{job_id}", tags=["queue"])
async def delete(request: Request, owner: str, name: str, job_id: str) -> Response:
    """Remove a finished request with all its files."""
    service = service_of(request)
    job = await service.job(job_id, service.caller(request))
    try:
        await asyncio.to_thread(service.delete, job)
    except Unfinished as refused:
        raise WireError(409, str(refused)) from refused
    service.snapshot.drop(job_id)
    return JSONResponse({"status": "DELETED"})


@routes.post("/{owner}/{name}", tags=["queue"], openapi_extra=BODY)
@routes.post("/{owner}/{name}/{sub:path}", tags=["queue"], openapi_extra=BODY, include_in_schema=False)
async def submit(request: Request, owner: str, name: str, sub: str = "") -> Response:
    """Queue a training."""
    job = await submit_job(request, owner, name)
    body = wire.submitted(job, base_of(request), service_of(request).snapshot.position(job))
    return JSONResponse(body, 200, {wire.REQUEST_ID: job.id})


run_routes = APIRouter(prefix="/run")


@run_routes.post("/{owner}/{name}/stream", tags=["run"], openapi_extra=BODY)
async def run_stream(request: Request, owner: str, name: str) -> Response:
    """Train, sending an event for every change; the last event is the result."""
    service, base = service_of(request), base_of(request)
    refuse_if_full(service.waiters, "open streams")
    job = await submit_job(request, owner, name)
    caller = service.caller(request)

    async def events() -> AsyncIterator[str]:
        async for event in _events(service, caller, job.id, base, True):
            yield event
        with contextlib.suppress(WireError):
            done = await service.job(job.id, caller)
            yield f"data: {json.dumps(wire.answer_of(service, done, base)[1])}\n\n"

    return StreamingResponse(events(), 200, {wire.REQUEST_ID: job.id}, "text/event-stream")


@run_routes.post("/{owner}/{name}", tags=["run"], openapi_extra=BODY)
@run_routes.post("/{owner}/{name}/{sub:path}", tags=["run"], openapi_extra=BODY, include_in_schema=False)
async def run(request: Request, owner: str, name: str, sub: str = "") -> Response:
    """Train and answer with the result. If the connection drops, the job continues; repeat the request to find it."""
    service, base = service_of(request), base_of(request)
    refuse_if_full(service.waiters, "open streams")
    job = await submit_job(request, owner, name)
    caller = service.caller(request)
    async with service.waiters:
        while not (job := await service.job(job.id, caller)).is_finished:
            if await request.is_disconnected():
                raise WireError(499, "the client is gone", "client_disconnected")
            if service.stopping.is_set():
                raise WireError(503, "the server restarts; ask again", "runner_disconnected", {wire.REQUEST_ID: job.id})
            await service.snapshot.refreshed.wait()
    code, body = wire.answer_of(service, job, base)
    return _answer(body, code, job)
