"""Check the clips of an opened source; refuse or skip unusable ones."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from sa3dist.data.source.audio import AudioFacts, check_audio, check_whole
from sa3dist.data.source.captions import read_caption
from sa3dist.data.source.clip_stats import ClipStats, Measured
from sa3dist.data.source.containers import Container
from sa3dist.data.source.pairing import Listing, Pair
from sa3dist.data.source.prefetch import prefetch
from sa3dist.errors import DataError, Interrupted, counted, printable
from sa3dist.formats import ClipEntry, DatasetIndex, LeftOut

# The endpoint's documented limits (spec/training.md section 3).
CLIP_COUNT_RANGE = (4, 2000)
MAX_PROBLEM_LINES = 20

Value = TypeVar("Value")
# Keys: SHA-256 of the audio bytes, and their number.
Known = dict[tuple[str, int], AudioFacts]
Measure = Callable[[bytes], tuple[AudioFacts, ClipStats]]
# Called with a clip's SHA-256 and bytes; raises DataError.
FactsOf = Callable[[str, bytes], AudioFacts]


def checked_clips(
    container: Container,
    listing: Listing,
    facts_of: FactsOf,
    num_workers: int | None,
    should_stop: Callable[[], bool],
    keep: Callable[[str, bytes], None] = lambda sha256, data: None,
) -> Iterator[tuple[Pair, ClipEntry | None, tuple[str, ...]]]:
    """(pair, clip or None, problems), sorted by key. Clips are checked in parallel, in bounded memory.

    keep   called with the digest and the audio bytes of every usable clip
    """
    checked = prefetch(
        lambda pair: _check(container, pair, facts_of, keep),
        listing.pairs,
        lambda pair: pair.audio.size,
        num_workers,
    )
    with contextlib.closing(checked):
        for pair, (clip, problems) in checked:
            if should_stop():
                raise Interrupted(f"{container.label}: stopped while checking clips; run again")
            yield pair, clip, problems


def _check(
    container: Container, pair: Pair, facts_of: FactsOf, keep: Callable[[str, bytes], None]
) -> tuple[ClipEntry | None, tuple[str, ...]]:
    caption, data, sha256, facts, problems = read_pair(container, pair, facts_of)
    if problems:
        return None, problems
    keep(sha256, data)
    audio = {"shard": "", "audio_offset": 0, "audio_bytes": len(data), "audio_sha256": sha256}
    return ClipEntry(pair.key, extension=pair.extension, caption=caption, **audio, **dataclasses.asdict(facts)), ()


def read_pair(
    container: Container, pair: Pair, examine: Callable[[str, bytes], Value]
) -> tuple[str, bytes, str, Value | None, tuple[str, ...]]:
    """Caption, audio bytes, their SHA-256, the result of ``examine``, and problems. What cannot be read is empty.

    examine   called with digest and bytes; a DataError it raises becomes a problem of the audio
    """
    caption, data, sha256, value, problems = "", b"", "", None, []
    try:
        caption = read_caption(container, pair.caption)
    except DataError as error:
        problems.append(f"{pair.caption_name}: {error}")
    try:
        data = container.read(pair.audio)
        sha256 = hashlib.sha256(data).hexdigest()
        value = examine(sha256, data)
    except DataError as error:
        problems.append(f"{printable(pair.audio.name)}: {error}")
    return caption, data, sha256, value, tuple(problems)


def decoder(known: Known, measure: Measure | None = None, stats: Measured | None = None) -> FactsOf:
    """A function that decodes clips that are not in ``known``. If ``measure`` is given, its results go to ``stats``."""

    def facts_of(sha256: str, data: bytes) -> AudioFacts:
        key = sha256, len(data)
        if key in known:
            # An earlier version may have accepted a file with lost audio.
            check_whole(data, known[key].samples)
            return known[key]
        if measure is None:
            return check_audio(data)
        stats[key] = measure(data)
        return stats[key][0]

    return facts_of


def earlier_indices(shards_dir: Path) -> list[DatasetIndex]:
    """Indices of earlier runs. Damaged and outdated ones are ignored; their clips are decoded and written again."""
    indices = map(DatasetIndex.find, sorted(path for path in shards_dir.glob("[0-9a-f]*") if path.is_dir()))
    return [index for index in indices if index is not None]


def known_facts(earlier: list[DatasetIndex]) -> Known:
    """Facts of the clips in ``earlier``, so that unchanged clips are not decoded again."""
    return {
        (clip.audio_sha256, clip.audio_bytes): AudioFacts(clip.samples, clip.sample_rate_hz, clip.channels)
        for index in earlier
        for clip in index.clips
    }


def raise_or_skip(
    label: str,
    refusals: Sequence[str],
    problems: dict[str, tuple[str, ...]],
    usable: int,
    on_bad_clip: str,
    any_size: bool,
    left_out: Sequence[LeftOut] = (),
) -> tuple[str, ...]:
    """Raise all problems as one DataError, or return the skipped ones, one line per clip.

    refusals   faults of the archive; never skipped
    problems   key of a clip -> its problems
    usable     number of usable clips
    left_out   files that are not clips
    """
    bad = [line for key in sorted(problems) for line in problems[key]]
    lines = list(refusals) + (bad if on_bad_clip == "raise" else [])
    # Clips that are reported can be repaired: their number is a problem only if repairing all would not help.
    possible = usable + len(problems) if on_bad_clip == "raise" else usable
    miscount = count_problem(usable, any_size, possible)
    if miscount and not refusals:
        # If too few clips are left, the skipped ones are the reason.
        lines = [miscount, *bad, *(f"left out: {kind.line()}" for kind in left_out)]
        causes = [kind for kind in left_out if kind.what not in ("caption", "system file")]
        if not possible and len(causes) == 1:
            # A zip of zips, for example: one line is enough.
            lines = [f"found no usable clip, but {causes[0].line()}"]
    if lines:
        hidden = len(lines) - MAX_PROBLEM_LINES
        if hidden > 0:
            lines[MAX_PROBLEM_LINES:] = [f"and {counted(hidden, 'more problem')}"]
        raise DataError("\n".join(f"{label}: {line}" for line in lines))
    return tuple("; ".join(problems[key]) for key in sorted(problems))


def check_count(label: str, count: int, any_size: bool) -> None:
    """Raise DataError if a data set has too few or too many clips."""
    if problem := count_problem(count, any_size, count):
        raise DataError(f"{label}: {problem}")


def count_problem(usable: int, any_size: bool, possible: int) -> str | None:
    """The problem with the number of usable clips, or None. possible: their number if all faults were repaired."""
    low, high = (1, usable) if any_size else CLIP_COUNT_RANGE
    if low <= possible and usable <= high:
        return None
    if any_size:
        return "found no usable clip; expected audio files, each with a .txt caption of the same name"
    count = counted(usable, "usable clip")
    return f"found {count}, expected {low} to {high}; set allow_any_dataset_size: true to lift the limits"
