"""Stop requests: a signal, or the end of the allowed time, asks for a save at the next step boundary.

A late repeat of a signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from sa3dist.errors import EXIT_INTERRUPTED, Interrupted
from sa3dist.parallel import lock

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Launch agents and schedulers repeat a signal within milliseconds; a person who means it waits longer.
SAME_REQUEST_SECONDS = 5.0
# How long giving back the lock may take at an end that waits for nothing.
RELEASE_SECONDS = 1.0
# What a process takes to end after its last save.
EXIT_SECONDS = 5.0


class StopRequest:
    """Whether this process was asked to stop. While ``saving`` is true no signal ends it.

    polls         how often it was called: a sign of life of the main thread, or of one that it waits for
    holds_state   training has begun: stopping has to save
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.saving = False
        self.polls = 0
        self.holds_state = False
        self._first_at = 0.0
        self._ends_at: float | None = None
        self._allowed_seconds = 0.0
        self._reserve_seconds = EXIT_SECONDS

    def install(self) -> StopRequest:
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def limit(self, allowed_seconds: float) -> None:
        """Ask to stop in time to be gone ``allowed_seconds`` after this program's start."""
        self._allowed_seconds = allowed_seconds
        self._ends_at = time.monotonic() + allowed_seconds - seconds_since_start()

    def reserve(self, step_seconds: float, save_seconds: float) -> None:
        """What stopping takes, from what a step and a save have taken: twice that, for the next may be slower."""
        self._reserve_seconds = EXIT_SECONDS + 2 * (step_seconds + save_seconds)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._first_at = now
        elif now - self._first_at > SAME_REQUEST_SECONDS and not self.saving:
            # Not waited for where its disk does not answer: without its process it counts for nothing.
            giving_back = threading.Thread(target=lock.release_all, daemon=True)
            giving_back.start()
            giving_back.join(RELEASE_SECONDS)
            os._exit(EXIT_INTERRUPTED)

    @property
    def reason(self) -> str | None:
        """What asked this process to stop, if anything did."""
        if self.signal_name is not None:
            return self.signal_name
        if self._ends_at is not None and time.monotonic() > self._ends_at - self._reserve_seconds:
            return f"max_wall_time ({self._allowed_seconds:.0f} s) nearly over"
        return None

    def __call__(self) -> bool:
        self.polls += 1
        return self.reason is not None

    def asked(self) -> bool:
        """The same without being a sign of life: for threads beside the main one."""
        return self.reason is not None

    def raise_if_asked(self, doing: str) -> None:
        self.polls += 1
        if self.reason is not None:
            raise Interrupted(f"{self.reason} while {doing}; finished work is kept, run the same command to continue")


def seconds_since_start() -> float:
    """Age of this process, imports included; independent of the time of day."""
    # Field 22, counted behind the name, which may hold anything: start time in clock ticks since boot.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
