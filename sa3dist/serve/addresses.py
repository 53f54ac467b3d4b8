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
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"] == PROXY_PATH and scope["method"] != "OPTIONS":
            mapped = _map_target(headers.get(TARGET_HEADER, b"").decode("latin-1"))
            if mapped is None:
                detail = "x-fal-target-url names no address of the endpoint; nothing is forwarded"
                return await JSONResponse({"detail": detail, "message": detail}, 400)(scope, receive, send)
            return await self._app({**scope, **mapped}, receive, send)
        host = headers.get(b"host", b"").decode("latin-1").partition(":")[0].lower()
        if host in HOSTS:
            mapped = _with_prefix(HOSTS[host], scope["path"])
            return await self._app({**scope, **mapped, "sa3dist_is_mapped": True}, receive, send)
        if scope["path"].startswith("/queue/"):
            return await self._app({**scope, **_with_prefix("", scope["path"][6:])}, receive, send)
        return await self._app(scope, receive, send)


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
