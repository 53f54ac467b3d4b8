"""Read request bodies with limits on size and speed; and the address at which a client reached the server."""

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from sa3dist.serve.service import Service, WireError, service_of

# Bodies with a lower average speed are refused; 1 Mbit/s is twelve times as fast.
SLOWEST_BYTES_PER_SECOND = 10_000


def base_of(request: Request) -> str:
    """The server's URL as this client reaches it, for links in answers."""
    if request.scope.get("sa3dist_is_mapped"):
        return service_of(request).options.public_url
    return f"{request.url.scheme}://{request.url.netloc}"


async def blocks(service: Service, request: Request, most: int) -> AsyncIterator[bytes]:
    """The body in blocks. Raises WireError if it is too long, too slow, or incomplete."""
    length = request.headers.get("content-length", "0")
    too_long = WireError(413, f"the body is longer than {most} bytes")
    if not (length.isascii() and length.isdecimal()) or len(length) > 15 or int(length) > most:
        raise too_long
    received, stream, silent_seconds = 0, request.stream().__aiter__(), service.options.silent_seconds
    begin = time.monotonic()
    while True:
        left = begin + silent_seconds + received / SLOWEST_BYTES_PER_SECOND - time.monotonic()
        try:
            block = await asyncio.wait_for(anext(stream, None), min(max(left, 0), silent_seconds))
        except (TimeoutError, asyncio.TimeoutError) as silence:
            slow = f"{silent_seconds:g} s without a byte, or less than {SLOWEST_BYTES_PER_SECOND} bytes/s"
            raise WireError(408, f"the body comes too slowly: {slow}") from silence
        except ClientDisconnect as gone:
            raise WireError(499, "the client is gone", "client_disconnected") from gone
        if block is None:
            return
        received += len(block)
        if received > most:
            raise too_long
        if block:
            yield block


async def read_bounded(service: Service, request: Request, most: int) -> bytes:
    """A whole body of at most ``most`` bytes."""
    return b"".join([block async for block in blocks(service, request, most)])
