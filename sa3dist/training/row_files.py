"""Files of rows, one JSON object on a line, as runs append to them: a line that a kill has torn is passed over."""

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
    """The rows of a file; none where it is missing or cannot be read."""
    with contextlib.suppress(OSError):
        return list(objects(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    return []
