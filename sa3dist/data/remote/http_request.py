"""HTTP requests that send path and query unchanged, and responses limited to the requested range."""

import contextlib
import ipaddress
import re
from typing import Any
from urllib.parse import quote
from urllib.request import getproxies_environment, proxy_bypass_environment

import aiohttp
from aiohttp.hdrs import LOCATION
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from sa3dist.errors import DataError


def as_sent(address: str) -> URL:
    """The URL to request. Raises ValueError if it has no host.

    Path and query are kept byte for byte, because a signature may cover them. Only characters that are not allowed in a
    request (spaces, control characters, non-ASCII) are percent-encoded as UTF-8. The part after ``#`` is not sent.
    """
    scheme, _, rest = address.partition("://")
    authority = re.match(r"[^/?#]*", rest)[0]
    target = re.sub(r"[^!-~]", lambda match: quote(match[0], errors="surrogateescape"), rest[len(authority) :])
    url = URL(f"{scheme.lower()}://{authority}")
    if not url.host:
        raise ValueError("names no host")
    return URL(f"{url.scheme}://{url.raw_authority}{target.partition('#')[0]}", encoded=True)


def resolved(base: URL, location: str) -> str:
    """The target of a redirect from ``base``. Not with yarl, which unquotes the base's path when joining."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", location):
        return location
    if location.startswith("//"):
        return f"{base.scheme}:{location}"
    origin = f"{base.scheme}://{base.raw_authority}"
    if location.startswith("/"):
        return origin + location
    target = re.match(r"[^?#]*", location)[0]
    if not target:
        return origin + (base.raw_path if location.startswith("?") else base.raw_path_qs) + location
    parts = base.raw_path.split("/")[:-1]
    for part in target.split("/"):
        if part == "..":
            parts = parts[:-1] or [""]
        elif part != ".":
            parts.append(part)
    if part in ("..", "."):
        parts.append("")
    return origin + "/".join(parts) + location[len(target) :]


def proxy_for(url: URL) -> URL | None:
    """The proxy for ``url`` from http_proxy, https_proxy or all_proxy, unless no_proxy exempts its host.

    Raises DataError, naming the variable, if it is not an HTTP proxy.
    """
    proxies = getproxies_environment()
    key = url.scheme if proxies.get(url.scheme) else "all"
    if not proxies.get(key) or _is_exempt(url, proxies):
        return None
    text = proxies[key]
    with contextlib.suppress(ValueError):
        proxy = URL(text if "://" in text else f"http://{text}")
        if proxy.scheme in ("http", "https") and proxy.host:
            return proxy
    # Do not show its value, which may contain a password.
    raise DataError(f"{key}_proxy: is no HTTP proxy; expected http://host:port, or unset it")


def _is_exempt(url: URL, proxies: dict[str, str]) -> bool:
    if proxy_bypass_environment(f"{url.host}:{url.port}", proxies):
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(url.host)
        for entry in proxies.get("no", "").split(","):
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(entry.strip().strip("[]"), strict=False):
                    return True
    return False


class Request(aiohttp.ClientRequest):
    """One request, original or redirected: keeps the URL's bytes and chooses the proxy for each."""

    def __init__(self, method: str, url: URL, **options: Any) -> None:
        url = as_sent(str(url))
        if options.get("auth") is not None:
            # RFC 7617; aiohttp's default, Latin-1, cannot encode every password.
            options["auth"] = options["auth"]._replace(encoding="utf-8")
        super().__init__(method, url, **{**options, "proxy": proxy_for(url)})


class BoundedResponse(aiohttp.ClientResponse):
    """A response limited to the requested range: fsspec reads whole bodies, so an endless one would fill the memory."""

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        """As received, except that a redirect's Location is made absolute, as it will be requested."""
        if not self._headers or LOCATION not in self._headers:
            return self._headers
        headers = CIMultiDict(self._headers)
        with contextlib.suppress(ValueError):
            headers[LOCATION] = str(as_sent(resolved(self.url, headers[LOCATION])))
        return CIMultiDictProxy(headers)

    async def read(self) -> bytes:
        """The body. Raises DataError as soon as it is longer than the requested range, if any."""
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
        if not requested:
            return await super().read()
        wanted = int(requested[2]) - int(requested[1]) + 1
        body = bytearray()
        async for block in self.content.iter_any():
            body += block
            if len(body) > wanted:
                self.close()
                # Without user and query, which may be secret.
                address = self.url.with_user(None).with_query(None)
                raise DataError(
                    f"{address}: the server answers a request for {wanted} bytes with more of them; "
                    f"download the file by other means and give its path"
                )
        return bytes(body)
