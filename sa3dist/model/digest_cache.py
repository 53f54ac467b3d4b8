"""A cache on disk for digests of large files, so that a 9 GB file is not hashed at every start."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sa3dist.formats import digest_of, is_sealed, sealed, write_whole

# A file modified more recently could change again within the resolution of its modification time.
SETTLED_SECONDS = 2.0


class DigestCache:
    """Digests keyed by path, size, modification time and inode of a file; recomputed if any of these differs.

    directory   holds one small record per file; created with the first one
    verify      recompute every digest
    """

    def __init__(self, directory: Path, verify: bool = False) -> None:
        self.directory = Path(directory)
        self.verify = verify
        self._started: dict[tuple[str, str], tuple[dict[str, Any], bool, Future[str]]] = {}

    def begin(self, path: Path, what: str, compute: Callable[[], str]) -> None:
        """Start computing a digest in a thread, for a later ``of``. Hashing releases the interpreter's lock."""
        state = _state_of(path)
        if self._cached(state, what) is None:
            digest = ThreadPoolExecutor(1, "hash the base").submit(compute)
            self._started[str(path), what] = state, _is_settled(state), digest

    def of(self, path: Path, what: str, compute: Callable[[], str]) -> str:
        """The digest named ``what`` of a file: cached, from a thread that ``begin`` started, or from ``compute``.

        Raises what ``compute`` raises, here or in the thread.
        """
        if (str(path), what) in self._started:
            state, settled, digest = self._started.pop((str(path), what))
            return self._store(path, state, what, settled, digest.result())
        state = _state_of(path)
        cached = self._cached(state, what)
        return self._store(path, state, what, _is_settled(state), compute()) if cached is None else cached

    def _record_of(self, state: dict[str, Any]) -> Path:
        return self.directory / f"{digest_of(state['path'])}.json"

    def _cached(self, state: dict[str, Any], what: str) -> str | None:
        return None if self.verify else _read(self._record_of(state), state).get(what)

    def _store(self, path: Path, state: dict[str, Any], what: str, settled: bool, digest: str) -> str:
        """Record a digest if the file was ``settled`` in ``state`` and is still in that state; returns the digest."""
        if settled and _state_of(path) == state:
            record = self._record_of(state)
            body = json.dumps({**state, "digests": {**_read(record, state), what: digest}})
            write_whole(record, sealed(body.removesuffix("}")))
        return digest


def _is_settled(state: dict[str, Any]) -> bool:
    return time.time() - state["mtime_ns"] / 1e9 > SETTLED_SECONDS


def _state_of(path: Path) -> dict[str, Any]:
    stat = os.stat(path)
    return {
        "path": str(Path(path).resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "inode": stat.st_ino,
    }


def _read(path: Path, state: dict[str, Any]) -> dict[str, str]:
    """The digests in a record; none if it is missing, damaged, or of another state."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    if not is_sealed(data):
        return {}
    value = json.loads(data)
    return value["digests"] if all(value[name] == state[name] for name in state) else {}
