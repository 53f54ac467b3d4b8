"""What is said of the steps on rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sa3dist.progress import MetricsFile
from sa3dist.training.trainer import Trainer


class MetricsLogger:
    """A row of metrics.jsonl now and then, and the progress bar."""

    def __init__(
        self, trainer: Trainer, output_dir: Path, resumed_from: int | None, update: Callable, describe: Callable
    ) -> None:
        self._trainer, self._update, self._describe = trainer, update, describe
        self._metrics = MetricsFile(output_dir, resumed_from) if trainer.group.is_main else None
        self._begin = self._clock = time.perf_counter()
        self._first = self._last_logged = trainer.step
        self._waited = self._silent = 0.0

    def add(self, figures: dict[str, float]) -> None:
        """Take up the figures of one step as ``take_step`` gave them."""
        plan, settings, step = self._trainer.plan, self._trainer.settings, self._trainer.step
        self._waited += figures.pop("data_wait_seconds")
        self._silent += figures.pop("silent_crops")
        now = time.perf_counter()
        data_wait = self._waited / (now - self._clock)
        logged = step % settings.log_every == 0 or step == plan.steps
        # On all ranks: without an index each knows only its own.
        clips = self._trainer.clips_of_step() if logged and settings.log_clips else None
        if self._metrics and logged:
            row = {"step": step, **figures, "clips_seen": step * plan.global_batch}
            row["silent_crops"] = int(self._silent)
            if self._trainer.places is None:
                row["epoch"] = step * plan.global_batch / len(plan.clip_keys)
            else:
                row["repeated_clips"] = self._trainer.places.repeated
            row |= {"step_seconds": (now - self._clock) / (step - self._last_logged), "data_wait": data_wait}
            row |= self._describe()
            if clips is not None:
                row["clips"] = clips
            self._metrics.write(row)
            self._clock, self._waited, self._silent, self._last_logged = now, 0.0, 0.0, step
        rate = (step - self._first) / (now - self._begin)
        self._update(step, f"loss {figures['loss']:.4f} {rate:.2f} it/s, {data_wait:.0%} waiting for data")

    def sync(self) -> None:
        """Make the rows as durable as the checkpoint that follows."""
        if self._metrics:
            self._metrics.sync()
