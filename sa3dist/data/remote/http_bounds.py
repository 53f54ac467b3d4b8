"""HTTP responses that are never read beyond the range that was asked for."""

from __future__ import annotations

import contextlib
import re

import aiohttp
from aiohttp.hdrs import LOCATION
from multidict import CIMultiDict, CIMultiDictProxy

from sa3dist.data.remote.http_request import as_sent, resolved
from sa3dist.errors import DataError


class BoundedResponse(aiohttp.ClientResponse):
    """fsspec reads the whole body of what claims to be a part: an endless or compressed one would fill the memory."""

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        """As received, but a redirect's Location is the whole address, as it will be requested."""
        if not self._headers or LOCATION not in self._headers:
            return self._headers
        headers = CIMultiDict(self._headers)
        with contextlib.suppress(ValueError):
            headers[LOCATION] = str(as_sent(resolved(self.url, headers[LOCATION])))
        return CIMultiDictProxy(headers)

    async def read(self) -> bytes:
        """The body; DataError as soon as it is longer than the range that was asked for, if one was."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
        if not asked:
            return await super().read()
        wanted = int(asked[2]) - int(asked[1]) + 1
        body = bytearray()
        async for block in self.content.iter_any():
            body += block
            if len(body) > wanted:
                self.close()
                # Without the query, which may hold secrets.
                address = self.url.with_user(None).with_query(None)
                raise DataError(
                    f"{address}: the server answers a request for {wanted} bytes with more of them; "
                    f"download the file by other means and give its path"
                )
        return bytes(body)
