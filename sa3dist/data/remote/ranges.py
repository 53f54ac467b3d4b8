"""A few bytes from the middle of a remote file: in growing trouble with smaller requests, never more than asked for."""

from __future__ import annotations

from collections.abc import Callable

from sa3dist.data.remote.download import BLOCK_BYTES, SMALLEST_BLOCK_BYTES, persist
from sa3dist.data.remote.fetch import filesystem, redacted
from sa3dist.errors import EnvironmentFailure


class NoRanges(EnvironmentFailure):
    """The server sends whole files only."""


def read_range(source: str, file_bytes: int, first: int, length: int, should_stop: Callable[[], bool]) -> bytes:
    """``length`` bytes of the file at URL ``source``, from byte ``first`` on.

    file_bytes   length of the whole file
    What arrived before a connection broke is kept; what moves forward starts the count of retries again.
    Raises DataError when the file is not there or may not be read, NoRanges, EnvironmentFailure when it keeps breaking
    off, Interrupted.
    """
    label = redacted(source)
    reader = _Reader(*filesystem(source), label, file_bytes, first, length)
    persist(reader.attempt, label, should_stop, reader.moved)
    return bytes(reader.data)


class _Reader:
    """Attempts at one range. ``moved`` says whether the last one got further."""

    def __init__(self, system, path: str, label: str, file_bytes: int, first: int, length: int) -> None:
        self.system, self.path, self.label, self.file_bytes = system, path, label, file_bytes
        self.first, self.length = first, length
        self.data = bytearray()
        self.block = BLOCK_BYTES
        self.begun = 0

    def attempt(self) -> None:
        self.begun = len(self.data)
        options = {"block_size": self.block, "cache_type": "none", "size": self.file_bytes}
        with self.system.open(self.path, "rb", **options) as stream:
            stream.seek(self.first + self.begun)
            while (missing := self.length - len(self.data)) > 0:
                try:
                    block = stream.read(min(self.block, missing))
                except ValueError as error:
                    # How fsspec says that the whole file came instead of a part.
                    raise NoRanges(f"{self.label}: the server does not send parts of files") from error
                if not block or len(block) > missing:
                    raise OSError(f"{len(self.data) + len(block)} of {self.length} bytes arrived")
                self.data += block

    def moved(self) -> bool:
        if len(self.data) > self.begun:
            return True
        self.block = max(SMALLEST_BLOCK_BYTES, self.block // 4)
        return False
