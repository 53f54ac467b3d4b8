"""What this process is doing, and whether it makes progress: read by its watchdog, its peers and heartbeat.json."""

import dataclasses
from collections.abc import Callable

# Preparation may read, download and hash gigabytes without a break.
PREPARATION_SECONDS = 3600.0
# The one part of a step that all ranks do together; here healthy ranks wait for one that is not.
AVERAGING = "averaging gradients"
# Stages in which a rank that is asked to stop has state to save, or is done.
HOLDING_STATE = ("train", "export")


@dataclasses.dataclass
class Liveness:
    """Written by the main thread, read by others; every field is replaced whole.

    stage             part of the run: starting, base, shard, encode, prepare, train, export
    step              the optimiser step being worked on, 0 before training
    doing             what the main thread is doing
    place             number of things done in this step; all ranks do the same things in the same order
    timeout_seconds   how long it may go without progress
    progress_count    incremented with every sign of progress
    """

    stage: str = "starting"
    step: int = 0
    doing: str = "starting"
    place: int = 0
    timeout_seconds: float = PREPARATION_SECONDS
    progress_count: int = 0

    @property
    def holds_state(self) -> bool:
        """Whether training has begun, so that stopping has to save."""
        return self.stage in HOLDING_STATE

    def enter(self, stage: str, timeout_seconds: float = PREPARATION_SECONDS) -> None:
        self.stage, self.doing = stage, stage
        self.timeout_seconds = timeout_seconds
        self.progress()

    def begin(self, doing: str, step: int | None = None) -> None:
        """Note the current work. step: when a new step begins."""
        self.doing = doing
        self.place += 1
        if step is not None:
            self.step, self.place = step, 0
        self.progress()

    def progress(self) -> None:
        """Count a sign of progress."""
        self.progress_count += 1

    def counting(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """``should_stop`` for long work that calls it regularly; each call counts as progress."""

        def ask() -> bool:
            self.progress()
            return should_stop()

        return ask


class Unchanged:
    """How long a value has not changed, in seconds that this process was running.

    Counts ticks instead of reading a clock: then neither a clock that jumps nor a job that a scheduler suspends looks
    like a long time without progress.
    """

    def __init__(self) -> None:
        self._value: object = None
        self.seconds = 0.0

    def look(self, value: object, tick_seconds: float) -> float:
        """Call once per tick. Returns the seconds since ``value`` last changed."""
        self.seconds = self.seconds + tick_seconds if value == self._value else 0.0
        self._value = value
        return self.seconds
