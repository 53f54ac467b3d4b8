"""Read a range of a remote file. Broken connections are retried with smaller requests."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable

from fsspec import AbstractFileSystem

from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.data.remote.download import Attempts, retry
from sa3dist.data.remote.fetch import filesystem, redacted
from sa3dist.errors import EnvironmentFailure

log = logging.getLogger(__name__)

# Reading again helps against a transmission error, not against a changed file.
READS = 3


class NoRanges(EnvironmentFailure):
    """The server cannot send parts of files."""


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file that is not downloaded. Parts of it are read by range requests and cached.

    file_bytes   its length, from the server
    """

    url: str
    file_bytes: int
    cache: ClipCache
    should_stop: Callable[[], bool]

    def __str__(self) -> str:
        return redacted(self.url)

    def read(self, offset: int, length: int, sha256: str, what: str) -> bytes | None:
        """Read and verify one part; None if it never matches ``sha256``. Raises like ``read_range``."""
        cached = self.cache.get(sha256)
        if cached is not None:
            return cached
        for _ in range(READS):
            data = read_range(self.url, self.file_bytes, offset, length, self.should_stop)
            if hashlib.sha256(data).hexdigest() == sha256:
                self.cache.put(sha256, data)
                return data
            log.warning("%s, %s: bytes differ from the index, reading again", self, what)
        return None


def read_range(source: str, file_bytes: int, first: int, length: int, should_stop: Callable[[], bool]) -> bytes:
    """``length`` bytes of the file at URL ``source``, from byte ``first`` on.

    file_bytes   length of the whole file
    A retry continues after the bytes that have arrived; any progress resets the count of retries.
    Raises DataError if the file does not exist or may not be read, NoRanges, EnvironmentFailure if the connection keeps
    breaking, Interrupted.
    """
    label = redacted(source)
    reader = _Reader(*filesystem(source), label, file_bytes, first, length)
    retry(reader.attempt, label, should_stop, reader.progressed)
    return bytes(reader.data)


class _Reader(Attempts):
    """Attempts at one range."""

    def __init__(
        self, system: AbstractFileSystem, path: str, label: str, file_bytes: int, first: int, length: int
    ) -> None:
        super().__init__()
        self.system, self.path, self.label, self.file_bytes = system, path, label, file_bytes
        self.first, self.length = first, length
        self.data = bytearray()

    def attempt(self) -> None:
        self.begun = self.reached
        options = {"block_size": self.block, "cache_type": "none", "size": self.file_bytes}
        with self.system.open(self.path, "rb", **options) as stream:
            stream.seek(self.first + self.begun)
            while (missing := self.length - len(self.data)) > 0:
                try:
                    block = stream.read(min(self.block, missing))
                except ValueError as error:
                    # fsspec raises it if the server sends the whole file instead of a part.
                    raise NoRanges(f"{self.label}: the server does not send parts of files") from error
                if not block or len(block) > missing:
                    raise OSError(f"{len(self.data) + len(block)} of {self.length} bytes arrived")
                self.data += block
                self.reached = len(self.data)
