"""Disk cache of clips by digest, with a size limit; evicts the least recently used.

Any number of processes on one machine may share a cache. Writing and evicting take a lock. Reading does not: files
appear by rename, readers verify them, and an open file stays readable when it is evicted.
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

# Share of the cache to free when it is full, so that not every new clip requires listing all files.
SPARE_SHARE = 1 / 16


class ClipCache:
    """Audio bytes by their SHA-256, in ``directory``/<first two digits>/<digest>."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """max_bytes: total size of all clips, never exceeded; a larger clip is not stored."""
        self.directory = Path(directory)
        self.max_bytes = max_bytes

    def get(self, sha256: str) -> bytes | None:
        """The clip's bytes, verified, or None. Removes a damaged file, with a warning."""
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
        # Mark as recently used, unless another process has evicted it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Store a clip, evicting others if needed. Raises EnvironmentFailure if the disk is full."""
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
                f"{self.directory}: cannot store a clip ({error.strerror or error}); free space or lower cache_bytes"
            ) from error

    def _path(self, sha256: str) -> Path:
        return self.directory / sha256[:2] / sha256

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        # Opened per call, so that the lock also works between threads. It ends with its process.
        with (self.directory / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        # Count first: if killed in between, the count is too high, which the next full count corrects.
        self._write_count(self._read_count() + len(data))
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        if self._read_count() + needed <= self.max_bytes:
            return
        files = []
        for path in self.directory.glob("??/*"):
            if path.suffix == ".tmp":
                # We hold the lock, so the writer of this file was killed.
                path.unlink(missing_ok=True)
            # Removed just now, or by a reader that found it damaged.
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        if total + needed > self.max_bytes:
            goal = self.max_bytes - max(needed, int(SPARE_SHARE * self.max_bytes))
            for _, size, path in sorted(files):
                if total <= goal:
                    break
                path.unlink(missing_ok=True)
                total -= size
        self._write_count(total)

    def _read_count(self) -> int:
        """Stored size of all clips; max_bytes if it is not readable, so that all files are counted again."""
        try:
            return int((self.directory / ".bytes").read_text())
        except (FileNotFoundError, ValueError):
            return self.max_bytes

    def _write_count(self, total: int) -> None:
        (self.directory / ".bytes").write_text(str(total))
