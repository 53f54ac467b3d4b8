"""Write WebDataset tars whose bytes depend on nothing but the clips, and read one clip from a tar."""

import contextlib
import dataclasses
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sa3dist.errors import DataError
from sa3dist.formats import ClipEntry, ShardEntry, atomic_path

_SAFE_STEM = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LOOKS_HASHED = re.compile(r".*-[0-9a-f]{12}")
# (shard, offset) -> the digest this process has verified there, and the state of the file at that time: a worker that
# reads a clip in every epoch hashes it once, and again when the shard has been written to.
_compared: dict[tuple[str, int], tuple[str, int, int, int]] = {}


def member_stem(key: str) -> str:
    """``key`` as a member name: webdataset splits names at the first dot, ustar allows 100 bytes, some only ASCII.

    Plain keys stay as they are; others get a hash, so that no two keys share a name.
    """
    if _SAFE_STEM.fullmatch(key) and not _LOOKS_HASHED.fullmatch(key):
        return key
    return re.sub(r"[^A-Za-z0-9_-]+", "_", key)[-48:] + "-" + hashlib.sha256(key.encode()).hexdigest()[:12]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, clips: list[ClipEntry], read_audio) -> tuple[ShardEntry, list[ClipEntry]]:
    """Write ``clips`` as <stem>.<extension> + <stem>.txt in the given order, atomically.

    read_audio(clip) -> bytes; called once per clip, in order, so that one clip at a time is in memory.
    Returns the shard's entry, and the clips with ``shard`` and ``audio_offset`` filled in.
    """
    placed = []
    with new_tar(path) as out:
        for clip in clips:
            stem = member_stem(clip.key)
            offset = out.add(f"{stem}.{clip.extension}", read_audio(clip))
            out.add(f"{stem}.txt", clip.caption.encode())
            placed.append(dataclasses.replace(clip, shard=path.name, audio_offset=offset))
    return out.entry, placed


class TarWriter:
    """Adds members to a file that counts and hashes what is written to it."""

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self._raw, self._position, self._state = raw, 0, hashlib.sha256()
        self._name = name
        self.entry: ShardEntry | None = None

    def add(self, name: str, data: bytes) -> int:
        """Append one member; returns where its data begins."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(data)
        self._write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> None:
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._write(b"\0" * (-self._position % tarfile.RECORDSIZE))
        self.entry = ShardEntry(self._name, self._position, self._state.hexdigest())

    def _write(self, data: bytes) -> None:
        self._raw.write(data)
        self._state.update(data)
        self._position += len(data)


@contextlib.contextmanager
def new_tar(path: Path) -> Iterator[TarWriter]:
    """A tar at ``path`` that appears there whole when the block ends; ``.entry`` then describes it.

    Same members, same bytes: owner, mode and time are constants.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as raw:
        out = TarWriter(raw, path.name)
        yield out
        out.finish()


def read_clip(shard: Path, entry: ClipEntry) -> bytes:
    """Audio bytes of ``entry``; nothing else of the shard is touched.

    Raises DataError naming shard and clip when it cannot be read, or when the bytes are not the ones in the index.
    """
    where = f"{shard}, clip {entry.key}"
    try:
        with open(shard, "rb") as stream:
            status = os.fstat(stream.fileno())
            stream.seek(entry.audio_offset)
            data = stream.read(entry.audio_bytes)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error}); run sa3dist shard") from error
    key = str(shard), entry.audio_offset
    state = entry.audio_sha256, status.st_ino, status.st_size, status.st_mtime_ns
    if len(data) == entry.audio_bytes and _compared.get(key) == state:
        return data
    if len(data) != entry.audio_bytes or hashlib.sha256(data).hexdigest() != entry.audio_sha256:
        raise DataError(
            f"{where}: the audio bytes are not the ones in the index, the shard is damaged; "
            f"delete {shard.parent} and run sa3dist shard"
        )
    _compared[key] = state
    return data
