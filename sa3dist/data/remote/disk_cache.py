"""A disk cache of clips by digest with a bound on its bytes: the least recently used go first.

Any number of processes of one machine share a cache. Reading takes no lock: a file appears whole, is verified by
whoever reads it, and stays readable for those who hold it open when it goes. Writing and evicting take the lock.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from sa3dist.errors import EnvironmentFailure

log = logging.getLogger(__name__)

# Freed at once when the cache is full, so that not every new clip makes us list all files.
SPARE_SHARE = 1 / 16


class ClipCache:
    """Audio bytes by their SHA-256, in ``directory``/<first two digits>/<digest>."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """max_bytes: of all clips together, never exceeded; a clip larger than that is not kept."""
        self.directory = Path(directory)
        self.max_bytes = max_bytes

    def get(self, sha256: str) -> bytes | None:
        """The clip's bytes, verified, or None. A damaged file is removed and said."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EnvironmentFailure(f"{path}: cannot be read ({error.strerror or error})") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            log.warning("%s: damaged, fetching the clip again", path)
            path.unlink(missing_ok=True)
            return None
        # Evicted meanwhile by another process: the bytes are good all the same.
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keep a clip, removing others where needed. Raises EnvironmentFailure when the disk is full."""
        path = self._path(sha256)
        if len(data) > self.max_bytes or path.exists():
            return
        try:
            with self._locked():
                if not path.exists():
                    self._make_room(len(data))
                    self._write(path, data)
        except OSError as error:
            raise EnvironmentFailure(
                f"{self.directory}: cannot keep a clip ({error.strerror or error}); free space or lower cache_bytes"
            ) from error

    def _path(self, sha256: str) -> Path:
        return self.directory / sha256[:2] / sha256

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        # One open file per caller, so that the lock also holds between threads. It ends with its process.
        with (self.directory / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        # Counted first: a kill in between leaves the count too high, which the next full count corrects.
        self._count(self._counted() + len(data))
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        if self._counted() + needed <= self.max_bytes:
            return
        held = []
        for path in self.directory.glob("??/*"):
            if path.suffix == ".tmp":
                # Writers hold the lock, and so do we: this one was killed.
                path.unlink(missing_ok=True)
            # Gone by that, or by a reader that found it damaged.
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                held.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in held)
        if total + needed > self.max_bytes:
            goal = self.max_bytes - max(needed, int(SPARE_SHARE * self.max_bytes))
            for _, size, path in sorted(held):
                if total <= goal:
                    break
                path.unlink(missing_ok=True)
                total -= size
        self._count(total)

    def _counted(self) -> int:
        """Bytes by the last count; without a readable one max_bytes, so that all files are counted again."""
        try:
            return int((self.directory / ".bytes").read_text())
        except (FileNotFoundError, ValueError):
            return self.max_bytes

    def _count(self, total: int) -> None:
        (self.directory / ".bytes").write_text(str(total))
