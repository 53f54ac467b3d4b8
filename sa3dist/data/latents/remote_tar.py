"""One latent shard that stays where it is: members read by range requests, kept in the bounded cache of clips."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable

from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.data.remote.fetch import redacted
from sa3dist.data.remote.ranges import read_range
from sa3dist.errors import EnvironmentFailure

log = logging.getLogger(__name__)

# A wrong byte on the way is cured by asking again; a changed shard is not.
READS = 3


@dataclasses.dataclass(frozen=True)
class RemoteTar:
    """Stands for the path of a shard. ``file_bytes`` is its length, as the server says."""

    url: str
    file_bytes: int
    cache: ClipCache
    should_stop: Callable[[], bool]

    def __str__(self) -> str:
        return redacted(self.url)

    def read(self, offset: int, length: int, sha256: str, what: str) -> bytes:
        """One member, verified. Raises EnvironmentFailure, naming shard and ``what``, when it is never as written."""
        held = self.cache.get(sha256)
        if held is not None:
            return held
        for _ in range(READS):
            data = read_range(self.url, self.file_bytes, offset, length, self.should_stop)
            if hashlib.sha256(data).hexdigest() == sha256:
                self.cache.put(sha256, data)
                return data
            log.warning("%s: the %s are not as the index has them, reading again", self, what)
        raise EnvironmentFailure(f"{self}: the {what} do not match their digest; copy shard and index there again")
