"""Stop requests: the first signal asks for a save at the next step boundary, a late repeat ends the process at once."""

from __future__ import annotations

import os
import signal
import time

from sa3dist.errors import EXIT_INTERRUPTED, Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Launch agents and schedulers repeat a signal within milliseconds; a person who means it waits longer.
SAME_REQUEST_SECONDS = 5.0


class StopRequest:
    """Whether this process was asked to stop. While ``saving`` is true no signal ends it."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.saving = False
        self._first_at = 0.0

    def install(self) -> StopRequest:
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._first_at = now
        elif now - self._first_at > SAME_REQUEST_SECONDS and not self.saving:
            os._exit(EXIT_INTERRUPTED)

    def __call__(self) -> bool:
        return self.signal_name is not None

    def raise_if_asked(self, doing: str) -> None:
        if self.signal_name is not None:
            raise Interrupted(
                f"{self.signal_name} while {doing}; finished work is kept, run the same command to continue"
            )
