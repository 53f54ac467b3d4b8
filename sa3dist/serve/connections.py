"""Connections of uvicorn whose clients may not be silent for ever, nor send the head of a request without end."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Longer than clients keep an idle connection (5 s): closed here first, it would lose a request that is on its way.
HEAD_SECONDS = 30.0
MAX_HEAD_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """One connection. A head of a request has to come within ``HEAD_SECONDS``; a body has limits of its own.

    The rest of a body that was refused is read in vain for as long, so that its sender comes to read why.
    """

    _end: asyncio.TimerHandle | None = None
    # Of a head that has begun; None: there is none at the moment.
    _head_bytes: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._limit()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The head of the request is longer than {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._end.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        # Another request may be waiting already, whose head is there.
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last:
            self._limit()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        super().connection_lost(exc)

    def _limit(self) -> None:
        self._end = self.loop.call_later(HEAD_SECONDS, self.transport.close)
