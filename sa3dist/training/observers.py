"""The interface of what observes a training without changing it; the loop calls it between steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sa3dist.runtime.signals import StopRequest

# Seconds for all observers and outputs to finish, after the last step and after an early end.
CLOSE_SECONDS = 10.0
EARLY_CLOSE_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Observation:
    """Result of one look at the training.

    step      the step before the look; 0 = before the first
    seconds   duration of the look; excluded from step times
    sums      numbers by name for the next row of metrics.jsonl; several observations add up
    row       numbers for a row of its own, at ``step``; empty = none
    folder    folder of previews made; None = none
    end       why the training is to end after this step, equal on all ranks; empty = it goes on
    long      whether a request to stop may have cut it short, equal on all ranks; a later start then repeats it
    """

    step: int
    seconds: float
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    end: str = ""
    long: bool = False


class Observer:
    """Observes a training. All ranks call every method; none changes adapters, gradients or draws.

    name   of its part in the startup times
    """

    name = ""

    def begin(self, stop: StopRequest) -> Observation | None:
        """Look at the base, or at the checkpoint a start continues from, before this start's first step."""

    def after_step(self, step: int, stop: StopRequest) -> Observation | None:
        """Look at the training after ``step``; None if nothing is due. Not called when the training is stopping."""

    def after_save(self, step: int, last: bool) -> None:
        """Called when a checkpoint of ``step`` is published or being written. last: no step follows."""

    def finish(self, early: bool) -> None:
        """The training is over: begin to finish background work. Does not wait.

        early   it was interrupted or failed, and someone waits for the end
        """

    def close(self, until: float) -> None:
        """Wait for background work, at most until ``time.monotonic()`` is ``until``."""

    def on_exit(self) -> None:
        """Called before the process ends: the run's last files are written, status.json among them."""


class Closing(Protocol):
    """What ``close_together`` can close."""

    def finish(self, early: bool) -> None: ...

    def close(self, until: float) -> None: ...


def close_together(parts: Sequence[Closing], early: bool, step_timeout: float) -> None:
    """Finish all parts at the same time: the end of a run takes as long as its slowest part.

    step_timeout   in seconds: other ranks wait no longer than a step may take
    """
    until = time.monotonic() + min(EARLY_CLOSE_SECONDS if early else CLOSE_SECONDS, step_timeout / 2)
    for part in parts:
        part.finish(early)
    for part in parts:
        part.close(until)
