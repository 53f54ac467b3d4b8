"""Results of a run's earlier evaluations, read from its files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path

from sa3dist.formats import BEST_ADAPTER_NAME
from sa3dist.training.row_files import METRICS_NAME, read_rows

BEST_NAME = "best.json"
# Keys in rows of metrics.jsonl.
LOSS, GAIN, SET = "val/loss", "val/gain", "validation_set"


@dataclasses.dataclass
class History:
    """Evaluations on one fixed set.

    base     loss of the base; None if not known yet
    losses   (step, loss) of every evaluation after a step, in order; non-finite losses count as infinite
    best     (step, loss) of the published best adapter; None if there is none
    """

    base: float | None = None
    losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    best: tuple[int, float] | None = None

    @classmethod
    def read(cls, output_dir: Path, set_digest: str) -> History:
        """Read metrics.jsonl and best.json. Empty if the base's row is missing or belongs to another set."""
        history = cls()
        rows = [row for row in read_rows(output_dir / METRICS_NAME) if LOSS in row]
        if not any(row["step"] == 0 and row.get(SET) == set_digest for row in rows):
            return history
        for row in rows:
            loss = math.inf if row[LOSS] is None else row[LOSS]
            if row["step"] == 0:
                history.base = loss
            else:
                history.losses.append((row["step"], loss))
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            value = json.loads((output_dir / BEST_NAME).read_text(encoding="utf-8"))
            if (output_dir / BEST_ADAPTER_NAME).exists():
                history.best = int(value["step"]), float(value[LOSS])
        return history

    @property
    def since_best(self) -> int:
        """Number of evaluations after the best of ``losses``."""
        values = [loss for _, loss in self.losses]
        return len(values) - 1 - values.index(min(values)) if values else 0

    def has(self, step: int) -> bool:
        return any(evaluated == step for evaluated, _ in self.losses)
