"""Write WebDataset tars whose bytes depend on nothing but the clips, and know where each clip's audio lies."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tarfile
from pathlib import Path

from sa3dist.formats import ClipEntry, ShardEntry, atomic_path

_SAFE_STEM = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LOOKS_HASHED = re.compile(r".*-[0-9a-f]{12}")


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
    Same clips, same bytes: owner, mode and time are constants.
    """
    placed = []
    with atomic_path(path) as temporary, temporary.open("wb") as raw:
        out = _Hashed(raw)
        for clip in clips:
            stem = member_stem(clip.key)
            offset = _add(out, f"{stem}.{clip.extension}", read_audio(clip))
            _add(out, f"{stem}.txt", clip.caption.encode())
            placed.append(dataclasses.replace(clip, shard=path.name, audio_offset=offset))
        out.write(b"\0" * (2 * tarfile.BLOCKSIZE))
        out.write(b"\0" * (-out.position % tarfile.RECORDSIZE))
        entry = ShardEntry(path.name, out.position, out.state.hexdigest())
    return entry, placed


class _Hashed:
    """A file that counts and hashes what is written to it."""

    def __init__(self, raw):
        self.raw, self.position, self.state = raw, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.raw.write(data)
        self.state.update(data)
        self.position += len(data)


def _add(out: _Hashed, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    out.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = out.position
    out.write(data)
    out.write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
    return offset
