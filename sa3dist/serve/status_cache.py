"""Middleware that answers status requests, the most frequent ones, from memory before any route."""

import re

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from sa3dist.serve.service import Service, WireError
from sa3dist.serve.snapshot import CachedAnswer

_STATUS = re.compile(r"/[^/]+/[^/]+/requests/([0-9a-f]{32})/status")
# Query strings of requests without logs. Those with logs read a file; see queue_routes.
_WITHOUT_LOGS = (b"", b"logs=0", b"logs=false", b"logs=False")


def address_key(scope: Scope) -> tuple[object, ...]:
    """What the addresses in an answer depend on: how the client has reached the server."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    return scope["scheme"], host, scope.get("sa3dist_is_mapped", False)


class CachedStatus:
    """Sends answers that the status route has cached in the snapshot.

    Passes a request on if its answer is not cached or the caller may not see it.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cached = self._cached(scope) if scope["type"] == "http" and scope["method"] == "GET" else None
        if cached is None:
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": cached.code, "headers": cached.headers})
        await send({"type": "http.response.body", "body": cached.body})

    def _cached(self, scope: Scope) -> CachedAnswer | None:
        match = _STATUS.fullmatch(scope["path"]) if scope["query_string"] in _WITHOUT_LOGS else None
        cached = self._service.snapshot.cached_answer(match[1], address_key(scope)) if match else None
        if cached is None:
            return None
        try:
            return cached if self._service.caller(Request(scope)).may_see(cached.owner) else None
        except WireError:
            return None
