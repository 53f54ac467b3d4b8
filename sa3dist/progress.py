"""The progress bar on stderr, or progress lines where stderr is not a terminal."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

# Least time between two progress lines in a log file.
LINE_SECONDS = 10.0


@contextlib.contextmanager
def progress(title: str, total: int, shown: bool) -> Iterator[Callable[..., None]]:
    """A bar on stderr with the time left. Yields update(done, text, total, seconds_left).

    Without a terminal it prints a line per tenth, at least LINE_SECONDS apart, but always the last one: quick work gets
    a single line. seconds_left None: estimate it from the speed so far.
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
            # Work done before the first call took none of this bar's time.
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
    """Minutes and seconds, with hours if there are any; "-" if unknown."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
