"""Status answers from memory, before any route: what clients ask for more often than for anything else."""

import re

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from sa3dist.serve.service import Service, WireError
from sa3dist.serve.snapshot import Ready

_STATUS = re.compile(r"/[^/]+/[^/]+/requests/([0-9a-f]{32})/status")
# Those with logs read a file; see queue_routes.
_WITHOUT_LOGS = (b"", b"logs=0", b"logs=false", b"logs=False")


def seen_as(scope: Scope) -> tuple[object, ...]:
    """All that an answer's addresses depend on: how the client has reached the server."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    return scope["scheme"], host, scope.get("sa3dist_is_mapped", False)


class ReadyStatus:
    """Middleware that gives out answers that the route of status has left in the snapshot.

    Whatever is not ready, or not allowed, is the routes' to answer.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready = self._ready(scope) if scope["type"] == "http" and scope["method"] == "GET" else None
        if ready is None:
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": ready.code, "headers": ready.headers})
        await send({"type": "http.response.body", "body": ready.body})

    def _ready(self, scope: Scope) -> Ready | None:
        found = _STATUS.fullmatch(scope["path"]) if scope["query_string"] in _WITHOUT_LOGS else None
        ready = self._service.snapshot.answer(found[1], seen_as(scope)) if found else None
        if ready is None:
            return None
        try:
            return ready if self._service.caller(Request(scope)).may_see(ready.owner) else None
        except WireError:
            return None
