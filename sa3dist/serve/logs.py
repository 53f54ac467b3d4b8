"""A job's log: lines of the trainer's output with times, in the endpoint's format; written by its runner, and read."""

import datetime
import json
from pathlib import Path
from typing import Any

from sa3dist.serve.job import Job
from sa3dist.training.row_files import objects

NAME = "logs.jsonl"
LONGEST_LINE = 2000
# Later lines of a job that writes more than this are only in log.txt.
MOST_BYTES = 8 << 20
BLOCK_BYTES = 1 << 16
RESULT = '{"lora_file": '
# Most that one ``read_logs`` returns.
MAX_LINES, MAX_BYTES = 1000, 512 << 10


def public(text: str, names: dict[str, str]) -> str:
    """``text`` with local paths replaced by ``names[path]``, the longest path first."""
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return text


def public_names(job: Job, work_dir: str, models: dict[str, str]) -> dict[str, str]:
    """Names to show clients instead of local paths; for ``public``."""
    paths = {value: str(job.request.get(name, name)) for name, value in job.settings.items()}
    names = {str(job.folder): "job", work_dir: "work", **{at: name for name, at in models.items()}}
    return names | {value: name for value, name in paths.items() if isinstance(value, str) and "/" in value}


class Logs:
    """Appends new lines of ``log``, the output of an attempt, to the job's log. names: as for ``public``."""

    def __init__(self, log: Path, job_folder: Path, names: dict[str, str]) -> None:
        self._log, self._target, self._names = log, job_folder / NAME, names
        self._offset = log.stat().st_size if log.exists() else 0
        # The last line, while it is incomplete.
        self._rest = b""

    def move(self) -> bool:
        """Append what was written since the last call; returns whether there was anything."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._offset)
                block = file.read(BLOCK_BYTES)
        except FileNotFoundError:
            return False
        self._offset += len(block)
        *lines, self._rest = (self._rest + block).split(b"\n")
        self._rest = self._rest[-BLOCK_BYTES:]
        # A progress bar overwrites its line: only its last state is logged.
        texts = [line.rsplit(b"\r", 1)[-1].decode(errors="replace").strip() for line in lines]
        # Without the run's last line, the result with local paths: clients get addresses instead.
        texts = [public(text, self._names)[:LONGEST_LINE] for text in texts if text and not text.startswith(RESULT)]
        self._append(texts)
        return bool(block)

    def _append(self, texts: list[str]) -> None:
        if not texts or (self._target.exists() and self._target.stat().st_size > MOST_BYTES):
            return
        time = datetime.datetime.now(datetime.timezone.utc).isoformat()
        rows = [{"message": text, "level": "STDERR", "source": "USER", "timestamp": time} for text in texts]
        with self._target.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_logs(job: Job, at: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The job's log lines from byte ``at`` on, the newest ``MAX_LINES`` of them, and the offset of their end."""
    path = job.folder / NAME
    size = path.stat().st_size if path.exists() else 0
    rows, end = read_rows(path, max(at, size - MAX_BYTES), MAX_BYTES)
    return rows[-MAX_LINES:], end


def read_rows(path: Path, at: int, most: int) -> tuple[list[dict[str, Any]], int]:
    """Complete rows of a file from byte ``at`` on, at most ``most`` bytes of them, and the offset of their end."""
    try:
        with path.open("rb") as file:
            file.seek(at)
            data = file.read(most)
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    return list(objects(whole.decode(errors="replace").splitlines())), at + len(whole)
