"""A disk cache of clips by digest, of bounded size: the least recently used clips are deleted first.

Any number of processes on one machine share a cache. Reading takes no lock: files appear atomically, readers verify
them, and an open file stays readable when it is deleted. Writing and evicting take the lock.
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

# Share freed at once when the cache is full, so that not every new clip lists all files.
SPARE_SHARE = 1 / 16


class ClipCache:
    """Audio bytes by their SHA-256, in ``directory``/<first two digits>/<digest>."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """max_bytes: of all clips together, never exceeded; a larger clip is not kept."""
        self.directory = Path(directory)
        self.max_bytes = max_bytes

    def get(self, sha256: str) -> bytes | None:
        """The clip's verified bytes, or None. A damaged file is removed, with a warning."""
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
        # Another process may have evicted it since: the bytes are still good.
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keep a clip, evicting others if needed. Raises EnvironmentFailure when the disk is full."""
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
        # Each caller opens the file itself, so that the lock also works between threads. It ends with the process.
        with (self.directory / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        # Count first: after a kill in between the count is too high, which the next full count corrects.
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
                # Writers hold the lock, as we do now: this one was killed.
                path.unlink(missing_ok=True)
            # It may be gone already: deleted above, or by a reader that found it damaged.
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
        """Bytes by the last count; if that is unreadable, max_bytes, so that all files are counted again."""
        try:
            return int((self.directory / ".bytes").read_text())
        except (FileNotFoundError, ValueError):
            return self.max_bytes

    def _count(self, total: int) -> None:
        (self.directory / ".bytes").write_text(str(total))
