"""Validate an untrusted index. A matching digest proves integrity, not origin."""

import math
import re
from collections.abc import Iterator
from typing import Any

from sa3dist.data.remote.fetch import MAX_MEMBER_BYTES
from sa3dist.data.source.audio import MAX_SECONDS, SAMPLE_RATE_RANGE_HZ
from sa3dist.data.source.containers import name_fault
from sa3dist.data.source.kinds import AUDIO_EXTENSIONS
from sa3dist.formats import ClipEntry, DatasetIndex, LeftOut, ShardEntry

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar")


def index_faults(index: DatasetIndex) -> Iterator[str]:
    """Faults of an untrusted index, one line each, without full stop; none for an index that we wrote."""
    for shard in index.shards:
        if not (_SHARD_NAME.fullmatch(str(shard.name)) and is_whole(shard.bytes, 1)):
            yield f"names a shard {ascii(shard.name)[:80]}"
            return
    if not all(isinstance(line, str) and line.isprintable() for line in index.skipped):
        yield "lists skipped clips that are not lines of text"
    if not all(_is_left_out(kind) for kind in index.left_out):
        yield "lists left-out files that are not lines of text"
    shards = {str(shard.name): shard for shard in index.shards}
    keys = [clip.key for clip in index.clips]
    if not all(isinstance(key, str) for key in keys) or keys != sorted(set(keys)):
        yield "does not list every clip once, in order of its key"
        return
    for clip in index.clips:
        if (problem := _place_fault(clip, shards) or clip_fault(clip)) is not None:
            yield f"clip {ascii(clip.key)[:80]} {problem}"


def _is_left_out(kind: LeftOut) -> bool:
    return (
        all(isinstance(text, str) for text in (kind.what, kind.why, *kind.names))
        and (kind.what + kind.why).isprintable()
        and is_whole(kind.count, 1)
    )


def _place_fault(clip: ClipEntry, shards: dict[str, ShardEntry]) -> str | None:
    if str(clip.shard) not in shards:
        return "lies in a shard that is not listed"
    if not (is_whole(clip.audio_offset, 0) and is_whole(clip.audio_bytes, 1, MAX_MEMBER_BYTES)):
        return "has no usable place"
    if clip.audio_offset + clip.audio_bytes > shards[str(clip.shard)].bytes:
        return "lies outside its shard"
    return None


def clip_fault(clip: ClipEntry) -> str | None:
    """The first impossible value in a clip's entry, for a message; None if there is none."""
    if not isinstance(clip.key, str) or name_fault(clip.key):
        return "has an unusable name"
    if not is_digest(clip.audio_sha256) or clip.extension not in AUDIO_EXTENSIONS:
        return "has no usable digest or extension"
    rate_fits = is_whole(clip.sample_rate_hz, *SAMPLE_RATE_RANGE_HZ) and is_whole(clip.channels, 1)
    if not rate_fits or not is_whole(clip.samples, 1, MAX_SECONDS * clip.sample_rate_hz):
        return "has no usable length, sample rate or channels"
    if not (isinstance(clip.caption, str) and clip.caption.strip()):
        return "has no caption"
    try:
        clip.caption.encode()
    except UnicodeEncodeError:
        return "has a caption that is not text"
    return None


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
