"""uvicorn connections with limits on the time and size of a request's head."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Longer than clients keep idle connections (5 s): if the server closed first, a request just sent would be lost.
HEAD_SECONDS = 30.0
MAX_HEAD_BYTES = 64 << 10
TOO_LONG = f"The head of the request is longer than {MAX_HEAD_BYTES} bytes."


class Connection(HttpToolsProtocol):
    """One connection. The head of a request must arrive within ``HEAD_SECONDS``; bodies have separate limits.

    The rest of a refused body is read and discarded for the same time, so that its sender can read the answer.
    """

    # Closes the connection when it fires.
    _timer: asyncio.TimerHandle | None = None
    # Size of the head up to the last piece; None if no head is being received.
    _head_bytes: int | None = None
    # Size of its address and fields, counted while a piece is parsed.
    _parsed_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(TOO_LONG)

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(TOO_LONG if self._parsed_bytes > MAX_HEAD_BYTES else msg)

    def on_message_begin(self) -> None:
        self._head_bytes = self._parsed_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # With a colon, a space and the end of the line.
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > MAX_HEAD_BYTES:
            # Stops the parser: the answer is 400.
            raise ValueError(TOO_LONG)

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._timer.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        # If another request is in the pipeline, its head has already arrived.
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
