"""Monitoring of a server: health, metrics for Prometheus, and logs as JSON lines."""

import collections
import datetime
import json
import logging
import secrets
import sys
import time

import prometheus_client
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sa3dist.serve.service import service_of
from sa3dist.serve.tables import UNFINISHED

log = logging.getLogger(__name__)
routes = APIRouter(tags=["operation"])
# If the last successful read of the database is older than this, the server is unhealthy.
STALE_SECONDS = 15.0
KEPT_HEADERS = {b"x-fal-tags": "tags", b"x-fal-runner-hint": "hint"}
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD")
JOBS = prometheus_client.Gauge("sa3dist_jobs", "unfinished jobs", ["state"])
REQUESTS = prometheus_client.Counter("sa3dist_requests", "answers", ["method", "status"])
SECONDS = prometheus_client.Histogram("sa3dist_request_seconds", "until an answer begins")


@routes.get("/healthz")
async def healthz(request: Request) -> Response:
    """200 while the database answers."""
    age = time.monotonic() - service_of(request).snapshot.read_at
    return JSONResponse({"ok": age < STALE_SECONDS, "database_read_ago": age}, 200 if age < STALE_SECONDS else 503)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    counts = collections.Counter(job.state for job in service_of(request).snapshot.all())
    for state in UNFINISHED:
        JOBS.labels(state).set(counts[state])
    return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)


class JsonLines(logging.Formatter):
    """Formats each record as a line of JSON, with the record's extra ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc).isoformat(timespec="milliseconds")
        row = {"time": when, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        row |= getattr(record, "fields", {})
        if record.exc_info:
            row["trace"] = self.formatException(record.exc_info)
        return json.dumps(row)


def log_as_json() -> None:
    """Log to stderr as ``JsonLines``: INFO and above from sa3dist, warnings from libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("sa3dist").setLevel(logging.INFO)


def kept_words(scope: Scope) -> dict[str, str]:
    """Client headers that are logged, to find its requests by."""
    headers = dict(scope["headers"])
    return {name: headers[key].decode("latin-1")[:1000] for key, name in KEPT_HEADERS.items() if key in headers}


class RequestLog:
    """Middleware that gives every request an id, counts it, and logs it, except successful GETs.

    An unexpected exception is logged with that id and answered with 500 in the endpoint's format.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, begin, status = secrets.token_hex(8), time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                SECONDS.observe(time.perf_counter() - begin)
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        fields = {"request_id": request_id, "client": (scope.get("client") or ("",))[0]}
        fields |= {"method": scope["method"], "path": scope["path"][:300]}
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("unexpected error", extra={"fields": fields})
            if not status:
                text = f"internal error; the server's log says more under {request_id}"
                body = {"detail": text, "message": text, "error_type": "internal_error"}
                answer = JSONResponse(body, 500, {"X-Fal-Error-Type": "internal_error"})
                await answer(scope, receive, send_with_id)
        finally:
            REQUESTS.labels(scope["method"] if scope["method"] in METHODS else "other", status).inc()
            # Polling would fill the log.
            if not (scope["method"] == "GET" and status < 400):
                seconds = round(time.perf_counter() - begin, 4)
                log.info(
                    "request", extra={"fields": fields | kept_words(scope) | {"status": status, "seconds": seconds}}
                )
