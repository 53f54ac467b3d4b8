"""Map the hosted endpoint's hosts to routes here, by the Host header and by the JavaScript client's proxy header.

Nothing is forwarded to other servers: a request goes to our own routes or is refused.
"""

from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

PROXY_PATH = "/api/fal/proxy"
TARGET_HEADER = b"x-fal-target-url"
# Prefix of each host's routes on this server.
HOSTS = {
    "fal.run": "/run",
    "falrun.com": "/run",
    "queue.fal.run": "",
    "queue.falrun.com": "",
    "rest.fal.ai": "/rest",
    "rest.fal.run": "/rest",
    # Of older clients, such as the JavaScript client 1.6.
    "rest.alpha.fal.ai": "/rest",
    "v3.fal.media": "",
}


class HostedAddresses:
    """Middleware that maps requests for the hosted endpoint's addresses to routes of this server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        changes = _changes(scope) if scope["type"] == "http" else {}
        if changes is None:
            detail = "x-fal-target-url names no address of the endpoint; nothing is forwarded"
            await JSONResponse({"detail": detail, "message": detail}, 400)(scope, receive, send)
        else:
            await self._app({**scope, **changes}, receive, send)


def _changes(scope: Scope) -> dict[str, Any] | None:
    """What to change in a request's scope to reach a route here; None for a target that is not the endpoint's."""
    headers = dict(scope["headers"])
    if scope["path"] == PROXY_PATH and scope["method"] != "OPTIONS":
        return _map_target(headers.get(TARGET_HEADER, b"").decode("latin-1"))
    host = headers.get(b"host", b"").decode("latin-1").partition(":")[0].lower()
    if host in HOSTS:
        return {**_with_prefix(HOSTS[host], scope["path"]), "sa3dist_is_mapped": True}
    if scope["path"].startswith("/queue/"):
        return _with_prefix("", scope["path"].removeprefix("/queue"))
    return {}


def _with_prefix(prefix: str, path: str) -> dict[str, Any]:
    return {"path": prefix + path, "raw_path": (prefix + path).encode()}


def _map_target(address: str) -> dict[str, Any] | None:
    try:
        parts = urlsplit(address)
        host, plain = parts.hostname, not parts.username and parts.port in (None, 443)
    except ValueError:
        return None
    if parts.scheme != "https" or host not in HOSTS or not plain or not parts.path.isascii():
        return None
    return {**_with_prefix(HOSTS[host], parts.path), "query_string": parts.query.encode()}
