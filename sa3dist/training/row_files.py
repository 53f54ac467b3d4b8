"""Files with one JSON object per line, as runs append them; a line torn by a kill is skipped."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"


def objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects among ``lines``."""
    for line in lines:
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        if isinstance(row, dict):
            yield row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; empty if it is missing or unreadable."""
    with contextlib.suppress(OSError):
        return list(objects(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    return []
