"""Split clips into shards, reuse shards of earlier runs, and write the report on a data set."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sa3dist.data.source.tar_writer import member_stem
from sa3dist.errors import counted, span
from sa3dist.formats import (
    NAMES_KEPT,
    ClipEntry,
    DatasetIndex,
    ShardEntry,
    atomic_path,
    digest_of,
    file_sha256,
    write_whole,
)

log = logging.getLogger(__name__)

REPORT_NAME = "report.txt"


def split(
    clips: Sequence[ClipEntry],
    max_shard_bytes: int,
    size_of: Callable[[ClipEntry], int] = lambda clip: clip.audio_bytes,
) -> Iterator[list[ClipEntry]]:
    """Groups of consecutive clips of at most ``max_shard_bytes`` (more only for a single larger clip).

    size_of   bytes of one clip; default: of its audio

    If several shards are needed, most cuts depend only on the names of clips, about two per full shard. A changed clip
    then moves at most the next cut, and the other shards can be reused.
    """
    total = sum(map(size_of, clips))
    halves = max(1, max_shard_bytes * len(clips) // max(2 * total, 1))
    # A power of two, so that it stays the same while the data set grows a little.
    chance = 1 << (halves.bit_length() - 1) if total > max_shard_bytes else 0
    group: list[ClipEntry] = []
    size = 0
    for clip in clips:
        drawn = int.from_bytes(hashlib.sha256(clip.key.encode()).digest()[:8], "little")
        named = chance and drawn % chance == 0 and size > max_shard_bytes // 8
        if group and (named or size + size_of(clip) > max_shard_bytes):
            yield group
            group, size = [], 0
        group.append(clip)
        size += size_of(clip)
    if group:
        yield group


class FinishedShards:
    """Shards of earlier runs, looked up by content."""

    def __init__(self, indices: Iterable[DatasetIndex]) -> None:
        self._places: dict[str, tuple[Path, ShardEntry, list[ClipEntry]]] = {}
        for index in indices:
            groups: dict[str, list[ClipEntry]] = {}
            for clip in index.clips:
                groups.setdefault(clip.shard, []).append(clip)
            for entry in index.shards:
                clips = groups.get(entry.name, [])
                self._places[_content(clips)] = (index.directory / entry.name, entry, clips)

    def reuse(self, clips: list[ClipEntry], target: Path) -> tuple[ShardEntry, list[ClipEntry]] | None:
        """Link or copy the shard with exactly ``clips`` to ``target``; None if there is no undamaged one.

        Returns the same as ``write_shard``. Takes no space on file systems with hard links.
        """
        path, entry, earlier_clips = self._places.get(_content(clips), (None, None, None))
        if path is None:
            return None
        try:
            if file_sha256(path) != entry.sha256:
                return None
            link_or_copy(path, target)
        except OSError:
            # Removed meanwhile, or the disk is full, which writing the shard will report.
            target.unlink(missing_ok=True)
            return None
        placed = [
            dataclasses.replace(clip, shard=target.name, audio_offset=earlier.audio_offset)
            for clip, earlier in zip(clips, earlier_clips, strict=True)
        ]
        return dataclasses.replace(entry, name=target.name), placed


def _content(clips: list[ClipEntry]) -> str:
    return digest_of(
        *(part for clip in clips for part in (member_stem(clip.key), clip.extension, clip.audio_sha256, clip.caption))
    )


def link_or_copy(path: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(path, target)
        return
    with atomic_path(target) as temporary:
        shutil.copyfile(path, temporary)


def describe(index: DatasetIndex) -> str:
    """A text report: statistics of the data set, its shards, and what was left out and why."""
    clips = index.clips
    seconds = [clip.seconds for clip in clips]
    words = [len(clip.caption.split()) for clip in clips]
    clips_in = Counter(clip.shard for clip in clips)
    first = {clip.shard: clip.key for clip in reversed(clips)}
    spread = f"{min(seconds):.2f} to {max(seconds):.2f} s, median {statistics.median(seconds):.2f} s"
    lines = [
        f"data set     {index.digest}",
        f"clips        {len(clips)}, {span(sum(seconds))}, {sum(c.audio_bytes for c in clips)} bytes",
        f"length       {spread}",
        f"formats      {_counted(clip.extension for clip in clips)}",
        f"sample rates {_counted(f'{clip.sample_rate_hz} Hz' for clip in clips)}",
        f"channels     {_counted(str(clip.channels) for clip in clips)}",
        f"captions     {len({clip.caption for clip in clips})} distinct, {min(words)} to {counted(max(words), 'word')}",
        f"skipped      {len(index.skipped)}",
        *(f"  {line}" for line in index.skipped),
        f"left out     {sum(kind.count for kind in index.left_out)}",
        *(f"  {kind.line(most=NAMES_KEPT)}" for kind in index.left_out),
        "",
        "shard                   bytes  clips  first",
        *(f"{shard.name} {shard.bytes:>12} {clips_in[shard.name]:>6}  {first[shard.name]}" for shard in index.shards),
    ]
    return "\n".join(lines) + "\n"


def write_report(index: DatasetIndex) -> None:
    """Write ``describe`` to the index's directory."""
    write_whole(index.directory / REPORT_NAME, describe(index))


def update_report(index: DatasetIndex) -> None:
    """``write_report`` if the existing one differs. Only warns on failure."""
    path = index.directory / REPORT_NAME
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == describe(index):
            return
    try:
        write_report(index)
    except OSError as error:
        log.warning("%s: cannot be written (%s)", path, error.strerror or error)


def _counted(values: Iterable[str]) -> str:
    return ", ".join(f"{count} x {value}" for value, count in sorted(Counter(values).items()))
