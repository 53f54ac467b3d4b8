"""Middleware that answers status requests, the most frequent ones, before any other middleware or route."""

import re

from fastapi import Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sa3dist.serve import wire
from sa3dist.serve.bodies import base_of
from sa3dist.serve.service import Service, WireError

_STATUS = re.compile(r"/[^/]+/[^/]+/requests/([0-9a-f]{32})/status")
# Query strings of requests without logs. Those with logs read a file; see queue_routes.
_WITHOUT_LOGS = (b"", b"logs=0", b"logs=false", b"logs=False")


class FastStatus:
    """Answers as the status route does, in a seventh of the time.

    Passes a request on if its job is not in memory or the caller may not see it.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer(scope) if scope["type"] == "http" and scope["method"] == "GET" else None
        await (answer or self._app)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        match = _STATUS.fullmatch(scope["path"]) if scope["query_string"] in _WITHOUT_LOGS else None
        job = self._service.snapshot.get(match[1]) if match else None
        if job is None:
            return None
        request = Request(scope)
        try:
            if not self._service.caller(request).may_see(job.key):
                return None
        except WireError:
            return None
        return wire.status_answer(job, base_of(request), self._service.snapshot.position(job), [])
