"""The health of a training at every save: what the adapters do to the weights, and what the losses say."""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3dist.adapters import adapted_layers
from sa3dist.listening.health_numbers import measure_layer, summary
from sa3dist.listening.verdict import judge
from sa3dist.training.metrics import RowsFile
from sa3dist.training.observers import Observation, Observer
from sa3dist.training.row_files import METRICS_NAME, objects

if TYPE_CHECKING:
    from torch import nn

    from sa3dist.model.base import Base
    from sa3dist.parallel.engine import Engine
    from sa3dist.runtime.process_group import Group
    from sa3dist.runtime.signals import StopRequest
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)

HEALTH_NAME = "health.jsonl"
# The mean is over at most and at least this many training losses: a single one depends on its timestep.
MOST_LOSSES, FEWEST_LOSSES = 50, 10
BAD = ("exploding", "overfit", "nothing learned")


def of_run(settings: Settings, base: Base, engine: Engine, group: Group, step: int) -> Health | None:
    """The health check that ``settings`` ask for; None = none. step: the training continues from there."""
    if not settings.health:
        return None
    return Health(base, group, settings.output_dir, step, engine.whole if engine.divided else None)


class Health(Observer):
    """Writes a row of ``output_dir/health.jsonl`` after every save, on rank 0.

    The other ranks hold the same adapters or, under ZeRO-3, parts of them.
    """

    name = "health"

    def __init__(
        self,
        base: Base,
        group: Group,
        output_dir: Path,
        step: int,
        whole: Callable[[nn.Module], contextlib.AbstractContextManager] | None = None,
    ) -> None:
        """step: rows of later steps are dropped.

        whole   ``Engine.whole`` if the ranks hold parts of a layer; they then measure together
        """
        self.base, self.group, self._whole = base, group, whole
        self.file = RowsFile(Path(output_dir) / HEALTH_NAME, step) if group.is_main else None
        self._losses = Losses(Path(output_dir) / METRICS_NAME)
        self._stop: StopRequest | None = None
        self._verdict, self._warned = "", False
        self._seconds: float = 0.0

    def begin(self, stop: StopRequest) -> None:
        self._stop = stop

    def after_step(self, step: int, stop: StopRequest) -> Observation | None:
        """Measures nothing: reports the time of the last save's check."""
        seconds, self._seconds = self._seconds, 0.0
        return Observation(step, seconds, {"health_seconds": seconds}) if seconds else None

    def after_save(self, step: int, last: bool) -> None:
        # After a signal there is no time for it.
        leaving = bool(self._stop and self._stop.requested())
        if self._whole is not None:
            leaving = self.group.any(leaving)
        if leaving or (self.file is None and self._whole is None):
            return
        begin = time.perf_counter()
        try:
            row = self.measure(step)
            if self.file is not None:
                self.file.write(row)
                self._log_verdict(row)
        except Exception as failure:
            if not self._warned:
                log.error("health of step %d left out: %s: %s; training goes on", step, type(failure).__name__, failure)
            self._warned = True
        self._seconds = time.perf_counter() - begin

    def measure(self, step: int) -> dict[str, Any]:
        """The row of ``step``, from the current adapters and the logged losses."""
        layers = []
        for name, layer in adapted_layers(self.base).items():
            self.group.liveness.progress()
            with self._whole(layer) if self._whole else contextlib.nullcontext():
                layers.append((name, measure_layer(layer)))
        row = {"step": step, **summary(layers)}
        verdict, reasons = judge(row, self._losses.read())
        return {**row, "verdict": verdict, "reasons": reasons}

    def _log_verdict(self, row: dict[str, Any]) -> None:
        """Log a changed verdict."""
        verdict = row["verdict"]
        if verdict != self._verdict:
            level = logging.WARNING if verdict in BAD else logging.INFO
            log.log(level, "health at step %d: %s (%s)", row["step"], verdict, "; ".join(row["reasons"]))
        self._verdict = verdict


class Losses:
    """Training and validation losses from metrics.jsonl; each row is read once."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self._training: collections.deque[float] = collections.deque(maxlen=MOST_LOSSES)
        self._validation: dict[str, float] = {}

    def read(self) -> dict[str, float]:
        """The mean of the last MOST_LOSSES training losses, and the last validation loss and gain, as far as known."""
        for row in self._new_rows():
            if "loss" in row:
                self._training.append(row["loss"])
            for name, key in (("validation", "val/loss"), ("gain", "val/gain")):
                if row.get(key) is not None:
                    self._validation[name] = row[key]
        enough = len(self._training) >= FEWEST_LOSSES
        return {**({"training": sum(self._training) / len(self._training)} if enough else {}), **self._validation}

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        data = b""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        return objects(data.decode(errors="replace").splitlines())
