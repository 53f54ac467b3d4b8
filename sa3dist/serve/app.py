"""The web server of the endpoint: all routes, errors in the endpoint's shape, and what runs beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sa3dist import __version__
from sa3dist.serve import file_routes, page_routes, queue_routes, webhooks
from sa3dist.serve.addresses import HostedAddresses
from sa3dist.serve.files import FileStore
from sa3dist.serve.jobs import JobStore
from sa3dist.serve.keys import Keys, Signer
from sa3dist.serve.server_options import Options
from sa3dist.serve.service import Service, WireError, message_of
from sa3dist.serve.snapshot import Snapshot
from sa3dist.serve.tables import DatabaseAway

log = logging.getLogger("sa3dist.serve.requests")
# Beyond this age of the last reading the server is not healthy.
STALE_SECONDS = 15.0
# Python's own number is six on two processors: as many webhooks with slow names would keep everybody else.
THREADS = 64
TIDY_SECONDS, AGAIN_SECONDS = 3600.0, 60.0


def create_app(options: Options, store: JobStore) -> FastAPI:
    """The application over a job store. It runs no jobs: a scheduler does, here or elsewhere."""
    files = FileStore(options.storage or str(options.data_dir / "files"))
    service = Service(options, store, Keys(options.data_dir), Signer(options.data_dir), files, Snapshot(store))

    @contextlib.asynccontextmanager
    async def beside(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "server"))
        await service.snapshot.refresh()
        works = [service.snapshot.keep_fresh, webhooks.Webhooks(service).deliver_all, lambda: _tidy(service)]
        tasks = [asyncio.create_task(_lasting(work)) for work in works]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(title="sa3dist", version=__version__, lifespan=beside, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_operation(app, service)
    # These before the queue, whose addresses begin with any word.
    app.include_router(page_routes.page)
    app.include_router(page_routes.api)
    app.include_router(file_routes.routes)
    app.include_router(queue_routes.run_routes)
    app.include_router(queue_routes.routes)
    app.add_exception_handler(WireError, _wire_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _refused_words)
    app.add_exception_handler(DatabaseAway, _database_away)
    app.add_middleware(HostedAddresses)
    app.add_middleware(
        CORSMiddleware,
        # Without keys a page of another site must not reach what runs on its visitor's machine.
        allow_origins=[] if options.is_open else ["*"],
        allow_origin_regex=r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?" if options.is_open else None,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-fal-request-id", "x-fal-error-type", "x-request-id"],
    )
    app.add_middleware(RequestLog)
    return app


async def _lasting(work: Callable[[], Awaitable[None]]) -> None:
    """Do ``work`` for ever: after what it did not expect, it begins again."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("unexpected; trying again in %g s", AGAIN_SECONDS)
            await asyncio.sleep(AGAIN_SECONDS)


async def _tidy(service: Service) -> None:
    while True:
        await asyncio.to_thread(service.tidy)
        await asyncio.sleep(TIDY_SECONDS)


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Response:
        """200 while the database answers."""
        age = time.time() - service.snapshot.read_at
        return JSONResponse({"ok": age < STALE_SECONDS, "database_read_ago": age}, 200 if age < STALE_SECONDS else 503)

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Counts for Prometheus."""
        for state in ("QUEUED", "RUNNING"):
            JOBS.labels(state).set(sum(job.state == state for job in service.snapshot.all()))
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/.well-known/jwks.json", tags=["operation"])
    async def jwks() -> Response:
        """The key that webhooks are signed with."""
        return JSONResponse(webhooks.public_keys(service.signer))


JOBS = prometheus_client.Gauge("sa3dist_jobs", "unfinished jobs", ["state"])
REQUESTS = prometheus_client.Counter("sa3dist_requests", "answers", ["method", "status"])
SECONDS = prometheus_client.Histogram("sa3dist_request_seconds", "until an answer begins")


class RequestLog:
    """Middleware that gives every request an id, counts it and writes a line of JSON about it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id, begin, status = secrets.token_hex(8), time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                SECONDS.observe(time.perf_counter() - begin)
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            REQUESTS.labels(scope["method"] if scope["method"] in METHODS else "other", status).inc()
            # Polling would drown everything else.
            if not (scope["method"] == "GET" and status < 400):
                row = {"request_id": request_id, "client": (scope.get("client") or ("",))[0]}
                row |= {"method": scope["method"], "path": scope["path"][:300], **_kept_words(scope)}
                row |= {"status": status, "seconds": round(time.perf_counter() - begin, 4)}
                log.info(json.dumps(row))


def _kept_words(scope: Scope) -> dict[str, str]:
    """What a client says for people to find its requests by."""
    headers = dict(scope["headers"])
    return {name: headers[key].decode("latin-1")[:1000] for key, name in KEPT_HEADERS.items() if key in headers}


KEPT_HEADERS = {b"x-fal-tags": "tags", b"x-fal-runner-hint": "hint"}
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD")


def _error(status: int, detail: Any, error_type: str | None, headers: dict[str, str]) -> Response:
    body = {"detail": detail, "message": message_of(detail)}
    if error_type is not None:
        body["error_type"] = error_type
        headers = {"X-Fal-Error-Type": error_type, **headers}
    return JSONResponse(body, status, headers)


async def _wire_error(request: Request, error: WireError) -> Response:
    return _error(error.status, error.detail, error.error_type, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, str(error.detail), None, dict(error.headers or {}))


async def _refused_words(request: Request, error: RequestValidationError) -> Response:
    found = [{key: problem[key] for key in ("loc", "msg", "type") if key in problem} for problem in error.errors()]
    return _error(422, [{**problem, "loc": list(problem["loc"])} for problem in found], None, {})


async def _database_away(request: Request, error: DatabaseAway) -> Response:
    return _error(503, f"{error}; try again", "runner_connection_refused", {"Retry-After": "2"})
