"""Record a run's warnings, and the machine and versions of each start, for its report."""

import contextlib
import json
import logging
import platform
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sa3dist.errors import EXIT_USER, SA3DistError
from sa3dist.formats import write_whole
from sa3dist.report.run_folder import STARTS_NAME, WARNINGS_NAME, without_keys


class _WarningsFile(logging.Handler):
    """Appends warnings and errors as JSON lines. Ignores failures to write."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        # The message is on stderr anyway, and a full disk is reported by other writers.
        with contextlib.suppress(OSError, ValueError, TypeError):
            message = without_keys(record.getMessage())
            row = {"time": now(), "level": record.levelname.lower(), "message": message}
            _append(self._path, row)


@contextlib.contextmanager
def recorded_warnings(output_dir: Path, anew: bool) -> Iterator[None]:
    """Append log records of level warning or above to ``output_dir/warnings.jsonl`` during the block.

    anew   start with an empty file: a new run begins
    If the run is refused (exit code 2), the file is restored.
    """
    path = Path(output_dir) / WARNINGS_NAME
    earlier = path.read_bytes() if path.is_file() else None
    if anew:
        # If output_dir is a file, the run itself refuses it.
        with contextlib.suppress(NotADirectoryError):
            path.unlink(missing_ok=True)
    handler = _WarningsFile(path)
    logging.getLogger().addHandler(handler)
    try:
        yield
    except SA3DistError as failure:
        if failure.exit_code == EXIT_USER:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True) if earlier is None else write_whole(path, earlier)
        raise
    finally:
        logging.getLogger().removeHandler(handler)


def record_start(output_dir: Path, resumed_from: int, device: Any, processes: int) -> None:
    """Append machine and versions of this start to ``output_dir/starts.jsonl``.

    resumed_from   step of the checkpoint that is continued, or 0
    device         the torch.device of this process
    """
    import torch

    from sa3dist import __version__

    cuda = device.type == "cuda"
    row = {
        "time": now(),
        "resumed_from": resumed_from,
        "sa3dist": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {platform.machine()}",
        "processes": processes,
        "host": socket.gethostname(),
    }
    path = Path(output_dir) / STARTS_NAME
    if not resumed_from:
        write_whole(path, "")
    _append(path, row)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
