"""Request bodies within bounds, in bytes and in silence, and the address a client reached us at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from sa3dist.serve.service import Service, WireError


def base_of(request: Request) -> str:
    """The server as this client reaches it: what it is told to follow leads there too."""
    if request.scope.get("sa3dist_is_mapped"):
        return service_url(request)
    return f"{request.url.scheme}://{request.url.netloc}"


def service_url(request: Request) -> str:
    return request.app.state.service.options.public_url


async def blocks(service: Service, request: Request, most: int) -> AsyncIterator[bytes]:
    """The body as it comes. Raises WireError for one that is too long, too slow, or breaks off."""
    told = request.headers.get("content-length", "0")
    too_long = WireError(413, f"the body is longer than {most} bytes")
    if not (told.isascii() and told.isdecimal()) or len(told) > 15 or int(told) > most:
        raise too_long
    received, stream = 0, request.stream().__aiter__()
    while True:
        try:
            block = await asyncio.wait_for(anext(stream, None), service.options.silent_seconds)
        except (TimeoutError, asyncio.TimeoutError) as silence:
            raise WireError(408, f"no byte of the body for {service.options.silent_seconds:g} s") from silence
        except ClientDisconnect as gone:
            raise WireError(499, "the client is gone", "client_disconnected") from gone
        if block is None:
            return
        received += len(block)
        if received > most:
            raise too_long
        if block:
            yield block


async def read_bounded(service: Service, request: Request) -> bytes:
    """A whole body of at most ``max_body_bytes``."""
    return b"".join([block async for block in blocks(service, request, service.options.max_body_bytes)])
