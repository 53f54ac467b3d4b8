"""uvicorn connections with limits on the time and size of a request's head."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Longer than clients keep idle connections (5 s): if the server closed first, a request just sent would be lost.
HEAD_SECONDS = 30.0
MAX_HEAD_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """One connection. The head of a request must arrive within ``HEAD_SECONDS``; bodies have separate limits.

    The rest of a refused body is read and discarded for the same time, so that its sender can read the answer.
    """

    # Closes the connection when it fires.
    _timer: asyncio.TimerHandle | None = None
    # Size of the head received so far; None if no head is being received.
    _head_bytes: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._start_timer()

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
