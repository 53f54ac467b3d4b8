"""What this process is doing, and whether it gets on: read by its watchdog, its peers and heartbeat.json."""

import dataclasses
from collections.abc import Callable

# Preparation reads, downloads and hashes gigabytes in one go.
PREPARATION_SECONDS = 3600.0
# The one thing of a step that all ranks do together, and where those that are well wait for one that is not.
AVERAGING = "averaging gradients"
# Stages in which a rank that is asked to stop has state to save, or is done.
HOLDING_STATE = ("train", "export")


@dataclasses.dataclass
class Liveness:
    """Written by the main thread, read by others; every field is replaced whole.

    stage             the part of the run: starting, base, shard, encode, prepare, train, export
    step              the optimiser step being worked on, 0 before training
    doing             what the main thread is at
    place             how many things it has done in this step: all ranks pass the same ones in the same order
    timeout_seconds   how long it may go without progress
    progress_count    counts up with every sign of progress
    """

    stage: str = "starting"
    step: int = 0
    doing: str = "starting"
    place: int = 0
    timeout_seconds: float = PREPARATION_SECONDS
    progress_count: int = 0

    @property
    def holds_state(self) -> bool:
        """Whether training has begun: stopping has to save."""
        return self.stage in HOLDING_STATE

    def enter(self, stage: str, timeout_seconds: float = PREPARATION_SECONDS) -> None:
        self.stage, self.doing = stage, stage
        self.timeout_seconds = timeout_seconds
        self.progress()

    def begin(self, doing: str, step: int | None = None) -> None:
        """step: given where a new one begins."""
        self.doing = doing
        self.place += 1
        if step is not None:
            self.step, self.place = step, 0
        self.progress()

    def progress(self) -> None:
        """Show that this process gets on with what it is doing."""
        self.progress_count += 1

    def counting(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """``should_stop`` for long work that asks as it gets on: each asking counts as progress."""

        def ask() -> bool:
            self.progress()
            return should_stop()

        return ask


class Unchanged:
    """For how long a value has not changed, in seconds this process was running.

    Counted in ticks, not read from a clock: neither a clock that jumps nor a job that a scheduler suspends looks like
    an hour without progress.
    """

    def __init__(self) -> None:
        self._value: object = None
        self.seconds = 0.0

    def look(self, value: object, tick_seconds: float) -> float:
        """Call once per tick. Returns the seconds since ``value`` changed."""
        self.seconds = self.seconds + tick_seconds if value == self._value else 0.0
        self._value = value
        return self.seconds
