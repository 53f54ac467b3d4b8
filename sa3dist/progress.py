"""What a run says while it trains: metrics.jsonl for programs, a progress bar for people."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sa3dist.formats import atomic_path

METRICS_NAME = "metrics.jsonl"
# Between two lines of progress in a log file.
LINE_SECONDS = 10.0


class MetricsFile:
    """One JSON object per logged step, appended; on resume, rows past the checkpoint are dropped."""

    def __init__(self, output_dir: Path, resumed_from: int | None) -> None:
        self._path = Path(output_dir) / METRICS_NAME
        self._resumed_from = resumed_from
        kept = _rows_up_to(self._path, resumed_from or 0)
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        if self._resumed_from is not None:
            row = {**row, "resumed_from": self._resumed_from}
            self._resumed_from = None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Make the rows written so far as durable as the checkpoint that follows."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())


def _rows_up_to(path: Path, step: int) -> list[str]:
    if step == 0 or not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # A kill in the middle of a write leaves a torn last line, which is past the checkpoint by construction.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept


@contextlib.contextmanager
def progress(title: str, total: int, shown: bool) -> Iterator[Callable[..., None]]:
    """A bar on stderr with the time left; gives update(done, text, total, seconds_left).

    Without a terminal a line for every tenth, but none within LINE_SECONDS of the one before, except for the last: what
    is done in a moment is said in one line. seconds_left None: what is left at the speed so far.
    """
    if not shown:
        yield lambda done, text="", total=0, seconds_left=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("ETA {task.fields[eta]}"),
    )
    begin, first, tenths = time.monotonic(), None, -1
    said = begin
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, text="", eta=clock_text(math.inf))

        def update(done: int, text: str = "", total: int = total, seconds_left: float | None = None) -> None:
            nonlocal first, tenths, said
            # What was done before the first call took none of this bar's time.
            first = max(done - 1, 0) if first is None else first
            if seconds_left is None:
                seconds_left = (time.monotonic() - begin) / max(done - first, 1) * max(total - done, 0)
            eta = clock_text(seconds_left)
            bar.update(task, completed=done, total=total, text=text, eta=eta)
            now, tenth = time.monotonic(), 10 * done // max(total, 1)
            if not console.is_terminal and tenth > tenths and (now - said >= LINE_SECONDS or done >= total):
                tenths, said = tenth, now
                print(f"{title} {done}/{total}{' ' * bool(text)}{text} ETA {eta}", file=sys.stderr, flush=True)

        yield update


def clock_text(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some; "-" while nobody can tell."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
