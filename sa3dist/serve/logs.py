"""What a trainer says, kept line by line with its time, in the form in which the endpoint gives logs out."""

import datetime
import json
from pathlib import Path

from sa3dist.serve.job import Job

NAME = "logs.jsonl"
LONGEST_LINE = 2000
# A job that says more than this has its later lines in log.txt alone.
MOST_BYTES = 8 << 20
PIECE_BYTES = 1 << 16
RESULT = '{"lora_file": '


def public(text: str, names: dict[str, str]) -> str:
    """``text`` with paths of this machine replaced by what stands for them; the longest first."""
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return text


def public_names(job: Job, work_dir: str, models: dict[str, str]) -> dict[str, str]:
    """What stands for this machine's paths wherever clients read; see ``public``."""
    paths = {value: str(job.request.get(name, name)) for name, value in job.settings.items()}
    names = {str(job.folder): "job", work_dir: "work", **{at: name for name, at in models.items()}}
    return names | {value: name for value, name in paths.items() if isinstance(value, str) and "/" in value}


class Logs:
    """Moves the new lines of ``log``, which an attempt writes, to the job's logs. names: see ``public``."""

    def __init__(self, log: Path, job_folder: Path, names: dict[str, str]) -> None:
        self._log, self._kept, self._names = log, job_folder / NAME, names
        self._place = log.stat().st_size if log.exists() else 0
        self._rest = b""

    def move(self) -> bool:
        """Move what has come since the last call; whether anything has."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._place)
                piece = file.read(PIECE_BYTES)
        except FileNotFoundError:
            return False
        self._place += len(piece)
        # A bar of progress writes over its own line: what it came to counts.
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._rest = self._rest[-PIECE_BYTES:]
        texts = [line.rsplit(b"\r", 1)[-1].decode(errors="replace").strip() for line in lines]
        # The run's last line is its result, with paths of this machine; clients are given addresses.
        texts = [public(text, self._names)[:LONGEST_LINE] for text in texts if text and not text.startswith(RESULT)]
        self._keep(texts)
        return bool(piece)

    def _keep(self, texts: list[str]) -> None:
        if not texts or (self._kept.exists() and self._kept.stat().st_size > MOST_BYTES):
            return
        time = datetime.datetime.now(datetime.timezone.utc).isoformat()
        rows = [{"message": text, "level": "STDERR", "source": "USER", "timestamp": time} for text in texts]
        with self._kept.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
