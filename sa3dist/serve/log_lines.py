"""Reads on in the log lines that a job's shepherd keeps: the newest ones, within bounds."""

import contextlib
import json
from typing import Any

from sa3dist.serve.job import Job
from sa3dist.serve.logs import NAME

MAX_LINES, MAX_BYTES = 1000, 512 << 10


class LogReader:
    """The lines of one job, from where the last call ended. at: where that was, in bytes."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def read(self, job: Job) -> list[dict[str, Any]]:
        """Rows that were completed since the last call, the newest ``MAX_LINES`` of them."""
        try:
            with (job.folder / NAME).open("rb") as file:
                size = file.seek(0, 2)
                begin = file.seek(max(self.at, size - MAX_BYTES))
                data = file.read(MAX_BYTES)
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        rows = []
        for line in data[:end].splitlines():
            # The first may be cut in the middle, where there is more than is read.
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        self.at = begin + end
        return rows[-MAX_LINES:]
