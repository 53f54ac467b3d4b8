"""Write WebDataset tars whose bytes depend only on the clips, and read single clips from them."""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from sa3dist.errors import DataError
from sa3dist.formats import ClipEntry, ShardEntry, atomic_path, file_sha256

_SAFE_STEM = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LOOKS_HASHED = re.compile(r".*-[0-9a-f]{12}")
# (shard, offset) -> digest verified by this process, and inode, size and time of the file. A clip that is read in every
# epoch is hashed once, and again if the shard changes.
_verified: dict[tuple[str, int], tuple[str, int, int, int]] = {}


def member_stem(key: str) -> str:
    """``key`` as a member name: short ASCII without dots, as webdataset, ustar and other tools require.

    Plain keys are unchanged; others get a hash, so that no two keys share a name.
    """
    if _SAFE_STEM.fullmatch(key) and not _LOOKS_HASHED.fullmatch(key):
        return key
    return re.sub(r"[^A-Za-z0-9_-]+", "_", key)[-48:] + "-" + hashlib.sha256(key.encode()).hexdigest()[:12]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, clips: list[ClipEntry], read_audio) -> tuple[ShardEntry, list[ClipEntry]]:
    """Write ``clips`` as <stem>.<extension> + <stem>.txt, in order, atomically.

    read_audio   called with each clip in turn, to hold only one clip's bytes in memory
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


class NewTar:
    """A tar being written. ``entry`` is set once it is complete."""

    entry: ShardEntry | None = None

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def add(self, name: str, data: bytes) -> int:
        """Append one member; returns the offset of its data."""
        # The defaults of TarInfo give every file the same mode, time and owner.
        info = tarfile.TarInfo(name)
        info.size = len(data)
        # After the header, which is one block in this format.
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(data))
        return offset


@contextlib.contextmanager
def new_tar(path: Path) -> Iterator[NewTar]:
    """Write a tar that appears at ``path`` when the block ends; ``.entry`` is then set. Same members, same bytes."""
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            out = NewTar(tar)
            yield out
        out.entry = ShardEntry(path.name, temporary.stat().st_size, file_sha256(temporary))


def read_clip(shard: Path, entry: ClipEntry) -> bytes:
    """Read only the audio bytes of ``entry``.

    Raises DataError naming shard and clip if they cannot be read or differ from the index.
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
    if len(data) == entry.audio_bytes and _verified.get(key) == state:
        return data
    if len(data) != entry.audio_bytes or hashlib.sha256(data).hexdigest() != entry.audio_sha256:
        raise DataError(
            f"{where}: the audio bytes are not the ones in the index, the shard is damaged; "
            f"delete {shard.parent} and run sa3dist shard"
        )
    _verified[key] = state
    return data
