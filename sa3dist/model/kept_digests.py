"""Digests of large files, kept on disk from one run to the next: no 9 GB file is hashed at every start."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sa3dist.formats import digest_of, is_sealed, sealed, write_whole

# A file changed so short a time ago could change again without its time of change showing it.
SETTLED_SECONDS = 2.0


class KeptDigests:
    """Digests under path, size, time of change and inode of the file they are of; made anew when any of these differs.

    directory   one small file there per file with digests; made when the first is
    verify      make every digest anew whatever is kept
    """

    def __init__(self, directory: Path, verify: bool = False) -> None:
        self.directory = Path(directory)
        self.verify = verify
        self._begun: dict[tuple[str, str], tuple[dict[str, Any], bool, Future[str]]] = {}

    def begin(self, path: Path, what: str, make: Callable[[], str]) -> None:
        """Let a thread of its own make what ``of`` will be asked for; hashing leaves the interpreter to others."""
        state = _state_of(path)
        if self._kept(state, what) is None:
            digest = ThreadPoolExecutor(1, "hash the base").submit(make)
            self._begun[str(path), what] = state, _is_settled(state), digest

    def of(self, path: Path, what: str, make: Callable[[], str]) -> str:
        """The digest called ``what`` of a file, kept or from ``make``; what has begun is waited for.

        Raises what ``make`` raised, here or in the thread.
        """
        if (str(path), what) in self._begun:
            state, settled, digest = self._begun.pop((str(path), what))
            return self._keep(path, state, what, settled, digest.result())
        state = _state_of(path)
        kept = self._kept(state, what)
        return self._keep(path, state, what, _is_settled(state), make()) if kept is None else kept

    def _record_of(self, state: dict[str, Any]) -> Path:
        return self.directory / f"{digest_of(state['path'])}.json"

    def _kept(self, state: dict[str, Any], what: str) -> str | None:
        return None if self.verify else _read(self._record_of(state), state).get(what)

    def _keep(self, path: Path, state: dict[str, Any], what: str, settled: bool, digest: str) -> str:
        """Write down a digest made of a file that was ``settled`` in ``state``, if it still is in that state."""
        if settled and _state_of(path) == state:
            record = self._record_of(state)
            body = json.dumps({**state, "digests": {**_read(record, state), what: digest}})
            write_whole(record, sealed(body.removesuffix("}")))
        return digest


def _is_settled(state: dict[str, Any]) -> bool:
    return time.time() - state["mtime_ns"] / 1e9 > SETTLED_SECONDS


def _state_of(path: Path) -> dict[str, Any]:
    found = os.stat(path)
    return {
        "path": str(Path(path).resolve()),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "inode": found.st_ino,
    }


def _read(path: Path, state: dict[str, Any]) -> dict[str, str]:
    """What is kept of a file in that state; nothing where the record is missing, damaged, or of another state."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    if not is_sealed(data):
        return {}
    value = json.loads(data)
    return value["digests"] if all(value[name] == state[name] for name in state) else {}
