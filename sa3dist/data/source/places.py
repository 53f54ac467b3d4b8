"""The bytes of one clip from its place in a shard on disk, never others than the index has."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from sa3dist.errors import DataError
from sa3dist.formats import ClipEntry

# What this process has compared with its digest: place -> that digest, and the state of the file it was read from. A
# worker that reads a clip in every epoch hashes it once, and again when the shard has been written to.
_compared: dict[tuple[str, int], tuple[str, int, int, int]] = {}


def read_clip(shard: Path, entry: ClipEntry) -> bytes:
    """Audio bytes of ``entry``; nothing else of the shard is touched.

    Raises DataError naming shard and clip when it cannot be read, or when the bytes are not the ones in the index.
    """
    place = f"{shard}, clip {entry.key}"
    try:
        with open(shard, "rb") as stream:
            status = os.fstat(stream.fileno())
            stream.seek(entry.audio_offset)
            data = stream.read(entry.audio_bytes)
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror or error}); run sa3dist shard") from error
    key = str(shard), entry.audio_offset
    state = entry.audio_sha256, status.st_ino, status.st_size, status.st_mtime_ns
    if len(data) == entry.audio_bytes and _compared.get(key) == state:
        return data
    if len(data) != entry.audio_bytes or hashlib.sha256(data).hexdigest() != entry.audio_sha256:
        raise DataError(
            f"{place}: the audio bytes are not the ones in the index, the shard is damaged; "
            f"delete {shard.parent} and run sa3dist shard"
        )
    _compared[key] = state
    return data
