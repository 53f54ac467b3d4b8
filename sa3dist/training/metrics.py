"""What rank 0 reports of the steps: rows of metrics.jsonl for programs, the progress bar's text for people."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3dist.formats import fsync, write_whole
from sa3dist.tracking.background import Trackers
from sa3dist.training.loss import BY_TIME, TIME_BINS
from sa3dist.training.memory import memory_figures
from sa3dist.training.row_files import METRICS_NAME, objects

if TYPE_CHECKING:
    from sa3dist.settings import Settings
    from sa3dist.training.observers import Observation
    from sa3dist.training.startup_times import Startup
    from sa3dist.training.trainer import Trainer


class Output:
    """A destination of rows on rank 0: a file, or trackers. Methods a subclass does not need do nothing."""

    def write(self, row: dict[str, Any]) -> None:
        """Take a row: numbers by name, some rows also lists or dicts. Rows may have different names."""

    def sync(self) -> None:
        """Make the rows written so far as durable as the checkpoint that follows."""

    def add_previews(self, step: int, folder: Path) -> None:
        """Take the previews made after ``step``, which are in ``folder``."""

    def finish(self) -> None:
        """Take no more rows. Does not wait."""

    def close(self, until: float) -> None:
        """Wait until everything taken is written, at most until ``time.monotonic()`` is ``until``."""


def open_outputs(settings: Settings, output_dir: Path, resumed_from: int | None) -> list[Output]:
    """All destinations of rows. Another tracker is one more entry.

    resumed_from   step of the checkpoint that is continued: later rows of the earlier run are dropped
    """
    rows = RowsFile(Path(output_dir) / METRICS_NAME, resumed_from)
    return [rows, Trackers(settings, output_dir, resumed_from)] if settings.log_with else [rows]


class RowsFile(Output):
    """One JSON object with a "step" per line, appended; on resume, rows past the checkpoint are dropped."""

    def __init__(self, path: Path, resumed_from: int | None) -> None:
        self._path = path
        # A kill during a write leaves a torn last line; it is past the checkpoint, whose save synced all rows before.
        text = path.read_text(encoding="utf-8", errors="replace") if resumed_from and path.exists() else ""
        steps = (row for row in objects(text.splitlines()) if isinstance(row.get("step"), int))
        write_whole(path, "".join(json.dumps(row) + "\n" for row in steps if row["step"] <= resumed_from))

    def write(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        fsync(self._path)


class MetricsLogger:
    """A row every ``log_every`` steps and at the end, and the progress bar's text after every step."""

    def __init__(
        self,
        trainer: Trainer,
        output_dir: Path,
        resumed_from: int | None,
        update: Callable[[int, str], None],
        startup: Startup | None = None,
    ) -> None:
        """update: moves the progress bar to a step, with a text; startup: its times go into the first row."""
        self._trainer, self._update, self._startup = trainer, update, startup
        self._outputs = open_outputs(trainer.settings, output_dir, resumed_from) if trainer.group.is_main else []
        self._resumed_from = {} if resumed_from is None else {"resumed_from": resumed_from}
        self._begin = self._clock = time.perf_counter()
        self._first = self._last_logged = trainer.step
        self._waited = self._silent = 0.0
        self._by_time = [0.0] * len(BY_TIME)
        self._observed: dict[str, float] = {}

    def add_observation(self, seen: Observation | None) -> None:
        """Take what an observer has found; None = nothing."""
        if seen is None:
            return
        for output in self._outputs:
            if seen.folder is not None:
                output.add_previews(seen.step, seen.folder)
            if seen.row:
                # One that comes before the first new step says where the run went on, as that step's row does.
                output.write({"step": seen.step, **seen.row, **self._resumed_from})
        self._begin += seen.seconds
        self._clock += seen.seconds
        for name, value in seen.sums.items():
            self._observed[name] = self._observed.get(name, 0) + value

    def add(self, values: dict[str, float], last: bool) -> None:
        """Add the values of one step, as returned by ``Trainer.take_step``; called on all ranks.

        last: no step follows, so the row is written in any case
        """
        trainer, plan, step = self._trainer, self._trainer.plan, self._trainer.step
        row = {"step": step, **values}
        waited, silent, _, *by_time = (
            row.pop(name) for name in ("data_wait_seconds", "silent_crops", "stop", *BY_TIME)
        )
        self._by_time = [total + value for total, value in zip(self._by_time, by_time, strict=True)]
        self._waited += waited
        self._silent += silent
        if self._startup and step == self._first + 1:
            self._startup.first_step_done(waited)
        now = time.perf_counter()
        data_wait = self._waited / (now - self._clock)
        if last or step % trainer.settings.log_every == 0:
            pairs = zip(self._by_time[:TIME_BINS], self._by_time[TIME_BINS:], strict=True)
            row["loss_by_timestep"] = [losses / clips if clips else None for losses, clips in pairs]
            self._by_time = [0.0] * len(BY_TIME)
            row |= {"clips_seen": step * plan.global_batch, "silent_crops": int(self._silent)}
            if trainer.cursors is None:
                row["epoch"] = step * plan.global_batch / len(plan.clip_keys)
            else:
                row["repeated_clips"] = trainer.cursors.repeated
            row |= {"step_seconds": (now - self._clock) / (step - self._last_logged), "data_wait": data_wait}
            row |= {"recomputed_blocks": trainer.base.recomputed_blocks, **memory_figures(trainer.group.device)}
            if self._startup:
                row["startup_seconds"] = self._startup.seconds
            if trainer.settings.log_clips:
                # On all ranks: without an index each rank knows only its own clips.
                row["clips"] = trainer.clips_of_step()
            row |= self._observed | self._resumed_from
            for output in self._outputs:
                output.write(row)
            self._clock, self._waited, self._silent, self._last_logged = now, 0.0, 0.0, step
            self._startup, self._resumed_from, self._observed = None, {}, {}
        rate = (step - self._first) / (now - self._begin)
        self._update(step, f"loss {values['loss']:.4f} {rate:.2f} it/s, {data_wait:.0%} waiting for data")

    def sync(self) -> None:
        """Make the rows as durable as the checkpoint that follows."""
        for output in self._outputs:
            output.sync()

    def finish(self, early: bool) -> None:
        """No row follows. early: as for observers."""
        for output in self._outputs:
            output.finish()

    def close(self, until: float) -> None:
        """Wait for the outputs, at most until ``time.monotonic()`` is ``until``."""
        for output in self._outputs:
            output.close(until)
