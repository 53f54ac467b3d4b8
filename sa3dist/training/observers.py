"""What watches a training without changing it: the interface that the loop calls between its steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sa3dist.runtime.signals import StopRequest

# What all that is still at work may take once the last step is done, and where the training ends before it.
CLOSE_SECONDS = 10.0
EARLY_CLOSE_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one look at the training has found.

    step      after which it was taken; 0 = before the first
    seconds   it took; no step's time holds them
    sums      numbers for the next row of metrics.jsonl, by name; those of several observations add up
    row       numbers for a row of their own, at ``step``; empty = none
    folder    previews made; None = none
    end       why the training is to end after this step, equal on all ranks; empty = it goes on
    long      whether it may have been cut short by a request to stop, equal on all ranks; a later start makes up for it
    """

    step: int
    seconds: float
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    end: str = ""
    long: bool = False


class Observer:
    """Watches a training. Every method is called on all ranks alike, and leaves adapters, gradients and draws alone.

    name   of its part in the times of the start
    """

    name = ""

    def begin(self, stop: StopRequest) -> Observation | None:
        """Look at the base, or at what a start continues from, before the first step of this start."""

    def after_step(self, step: int, stop: StopRequest) -> Observation | None:
        """Look at the training after ``step``; None where nothing is due. Not called when the training is stopping."""

    def after_save(self, step: int, last: bool) -> None:
        """A checkpoint of ``step`` is published, or being written. last: no step follows."""

    def finish(self, early: bool) -> None:
        """The training is over: what is at work here comes to its end from now on. Never waits.

        early   it was interrupted, or has failed, and whoever asked for that waits
        """

    def close(self, until: float) -> None:
        """Wait for what is at work, until ``time.monotonic()`` is ``until`` at most."""

    def leave(self) -> None:
        """The process ends: the run's last files are written, status.json among them."""


class Closing(Protocol):
    """What ``close_together`` waits for."""

    def finish(self, early: bool) -> None: ...

    def close(self, until: float) -> None: ...


def close_together(parts: Sequence[Closing], early: bool, step_timeout: float) -> None:
    """Let all come to their end at the same time, so that the end of a run takes what the slowest of them takes.

    step_timeout   in seconds: other ranks wait no longer than a step may take
    """
    until = time.monotonic() + min(EARLY_CLOSE_SECONDS if early else CLOSE_SECONDS, step_timeout / 2)
    for part in parts:
        part.finish(early)
    for part in parts:
        part.close(until)
