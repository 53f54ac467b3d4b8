"""What the index of a stranger must not hold: a sealed file is whole, but not for that reason one of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sa3dist.data.remote.fetch import MAX_MEMBER_BYTES
from sa3dist.data.source.archive import AUDIO_EXTENSIONS
from sa3dist.data.source.audio import MAX_SECONDS, SAMPLE_RATE_RANGE_HZ
from sa3dist.data.source.containers import name_fault
from sa3dist.formats import ClipEntry, DatasetIndex, LeftOut, ShardEntry

if TYPE_CHECKING:
    from sa3dist.data.latents.shards import EncodedClip, Encoders, LatentShard

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar")


def index_faults(index: DatasetIndex) -> Iterator[str]:
    """What a stranger's index must not hold, one line each, ending in no full stop; yields nothing for one of ours."""
    for shard in index.shards:
        if not (_SHARD_NAME.fullmatch(str(shard.name)) and _whole(shard.bytes, 1)):
            yield f"names a shard {ascii(shard.name)[:80]}"
            return
    if not all(isinstance(line, str) and line.isprintable() for line in index.skipped):
        yield "tells of skipped clips in no lines of text"
    if not all(_is_left_out(kind) for kind in index.left_out):
        yield "tells of files left out in no lines of text"
    shards = {str(shard.name): shard for shard in index.shards}
    keys = [clip.key for clip in index.clips]
    if not all(isinstance(key, str) for key in keys) or keys != sorted(set(keys)):
        yield "does not list every clip once, in order of its key"
        return
    for clip in index.clips:
        if (problem := _place_fault(clip, shards) or _clip_fault(clip)) is not None:
            yield f"clip {ascii(clip.key)[:80]} {problem}"


def _is_left_out(kind: LeftOut) -> bool:
    texts = kind.what, kind.why, *kind.names
    return (
        all(isinstance(text, str) for text in texts) and (kind.what + kind.why).isprintable() and _whole(kind.count, 1)
    )


def _place_fault(clip: ClipEntry, shards: dict[str, ShardEntry]) -> str | None:
    if str(clip.shard) not in shards:
        return "lies in a shard that is not listed"
    if not (_whole(clip.audio_offset, 0) and _whole(clip.audio_bytes, 1, MAX_MEMBER_BYTES)):
        return "has no usable place"
    if clip.audio_offset + clip.audio_bytes > shards[str(clip.shard)].bytes:
        return "lies outside its shard"
    return None


def _clip_fault(clip: ClipEntry) -> str | None:
    if not isinstance(clip.key, str) or name_fault(clip.key):
        return "has an unusable name"
    if not _is_digest(clip.audio_sha256) or clip.extension not in AUDIO_EXTENSIONS:
        return "has no usable digest or extension"
    rate_fits = _whole(clip.sample_rate_hz, *SAMPLE_RATE_RANGE_HZ) and _whole(clip.channels, 1)
    if not rate_fits or not _whole(clip.samples, 1, MAX_SECONDS * clip.sample_rate_hz):
        return "has no usable length, sample rate or channels"
    if not (isinstance(clip.caption, str) and clip.caption.strip()):
        return "has no caption"
    try:
        clip.caption.encode()
    except UnicodeEncodeError:
        return "has a caption that is no text"
    return None


def latent_faults(shard: LatentShard) -> Iterator[str]:
    """As ``index_faults``, of a latent shard's index."""
    if not (isinstance(shard.dataset, str) and _whole(shard.of, 1) and _whole(shard.number, 0, shard.of - 1)):
        yield "names no data set, or no place among its shards"
        return
    if not (_whole(shard.entry.bytes, 1) and _sound(shard.encoders)):
        yield "has no usable length or encoders"
        return
    for found in shard.clips:
        if (problem := _clip_fault(found.clip) or _member_fault(found, shard.entry.bytes)) is not None:
            yield f"clip {ascii(found.clip.key)[:80]} {problem}"


def _sound(encoders: Encoders) -> bool:
    texts = encoders.version, encoders.autoencoder, encoders.text_encoder
    sizes = encoders.sample_rate_hz, encoders.samples_per_frame, encoders.latent_channels, encoders.prompt_tokens
    return all(isinstance(text, str) and text.isprintable() for text in texts) and all(_whole(n, 1) for n in sizes)


def _member_fault(found: EncodedClip, shard_bytes: int) -> str | None:
    if not {"latents", "flipped"} <= found.places.keys() <= {"latents", "flipped", "prompt"}:
        return "has not both polarities"
    for place in found.places.values():
        if not (_whole(place.offset, 0) and _whole(place.bytes, 1) and _is_digest(place.sha256)):
            return "has no usable place"
        if place.offset + place.bytes > shard_bytes:
            return "lies outside its shard"
    return None


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
