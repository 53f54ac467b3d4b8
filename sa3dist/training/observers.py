"""What watches a training without changing it: the interface that the loop calls between its steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sa3dist.runtime.signals import StopRequest


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one look at the training has found.

    step      after which it was taken; 0 = before the first
    seconds   it took; no step's time holds them
    sums      numbers for the next row of metrics.jsonl, by name; those of several observations add up
    row       numbers for a row of their own, at ``step``; empty = none
    folder    previews made; None = none
    end       why the training is to end after this step, equal on all ranks; empty = it goes on
    """

    step: int
    seconds: float
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    end: str = ""


class Observer:
    """Watches a training. Every method is called on all ranks alike, and leaves adapters, gradients and draws alone.

    name   of its part in the times of the start
    """

    name = ""

    def begin(self, stop: StopRequest) -> Observation | None:
        """Look at the base, or at what a start continues from, before the first step of this start."""

    def after_step(self, step: int, stop: StopRequest) -> Observation | None:
        """Look at the training after ``step``; None where nothing is due. Not called when the training is stopping."""

    def after_save(self, step: int) -> None:
        """A checkpoint of ``step`` is published, or being written."""

    def close(self) -> None:
        """The training is over, however it ended."""
