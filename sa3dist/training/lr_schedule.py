"""The learning rate of every optimiser step: a pure function of the step, so that no state has to be saved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sa3dist.settings import Settings

# What is left of the peak at ``progress`` 0..1 through the steps after the warm-up. Zero is reached one step after the
# last, so that every step trains.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak over ``warmup_steps``, then one of ``DECAYS`` over the rest of ``steps``."""

    peak: float
    steps: int
    warmup_steps: int = 0
    decay: str = "constant"

    def rate(self, step: int) -> float:
        """Learning rate of optimiser step ``step``, counted from 1: the peak at the end of the warm-up."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        return self.peak * DECAYS[self.decay]((step - 1 - self.warmup_steps) / (self.steps - self.warmup_steps))

    def same_rates(self, other: Schedule) -> bool:
        """Whether both give the same rate at every step of the longer one."""
        if self.decay == other.decay == "constant":
            return (self.peak, self.warmup_steps) == (other.peak, other.warmup_steps)
        return self == other

    def __str__(self) -> str:
        warm_up = f"{self.warmup_steps} warm-up steps, " if self.warmup_steps else ""
        decay = self.decay if self.decay == "constant" else f"{self.decay} decay to 0 after step {self.steps}"
        return f"{self.peak:g}, {warm_up}{decay}"


def of_settings(settings: Settings) -> Schedule:
    """The schedule a run's settings ask for."""
    return Schedule(settings.learning_rate, settings.number_of_steps, settings.warmup_steps, settings.lr_scheduler)
