"""Stage 1: any source of captioned clips -> checked WebDataset tars and their index."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sa3dist.data.remote.fetch import MAX_TOTAL_BYTES
from sa3dist.data.source.archive import Listing, Pair, open_source, pair_members
from sa3dist.data.source.audio import AudioFacts, check_audio, check_whole
from sa3dist.data.source.bounded_map import ordered_map
from sa3dist.data.source.captions import read_caption
from sa3dist.data.source.clip_stats import ClipFigures, Measured, read_facts, read_figures, write_figures
from sa3dist.data.source.containers import Container
from sa3dist.data.source.kept_bytes import KeptBytes
from sa3dist.data.source.shard_split import (
    FinishedShards,
    Known,
    earlier_indices,
    known_facts,
    split,
    update_report,
    write_report,
)
from sa3dist.data.source.tar_writer import shard_name, write_shard
from sa3dist.errors import DataError, EnvironmentFailure, Interrupted, counted, printable
from sa3dist.formats import ClipEntry, DatasetIndex, LeftOut, ShardEntry, atomic_directory, digest_of

# The endpoint's documented limits (spec/training.md section 3).
CLIP_COUNT_RANGE = (4, 2000)
# Large enough to stream well, small enough that a damaged one is little lost.
MAX_SHARD_BYTES = 256 << 20
MAX_PROBLEM_LINES = 20
# Checked clips that need not be read again to be written.
KEPT_BYTES = 1 << 30
# Of larger sets no figures are kept on the way: these take 300 MB of memory.
MAX_MEASURED_CLIPS = 20_000

Measure = Callable[[bytes], tuple[AudioFacts, ClipFigures]]
# From a clip's SHA-256 and bytes; raises DataError.
FactsOf = Callable[[str, bytes], AudioFacts]


def build_shards(
    source: str,
    work_dir: Path,
    *,
    on_bad_clip: str = "raise",
    allow_any_dataset_size: bool = False,
    max_download_bytes: int = MAX_TOTAL_BYTES,
    output_dir: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    num_workers: int | None = None,
    measure: Measure | None = None,
    report: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> DatasetIndex:
    """Check every clip of ``source`` and write it to ``work_dir``/shards/<digest>/; the audio bytes stay as they are.

    source           path, file:// or fsspec URL of a zip, a folder or WebDataset tars (data/archive.py)
    on_bad_clip      "raise": one DataError lists all problems; "skip": bad clips are left out and named in .skipped
    output_dir       where the run writes its results; like what earlier runs have left, no part of the source
    num_workers      threads that decode; the shards do not depend on it. Default: one per core
    measure          decodes in place of ``check_audio``; the figures are kept in ``work_dir`` for ``sa3dist inspect``
    report           called as report(checked, total) after every clip
    should_stop      polled after every clip; when true, Interrupted is raised and nothing stays behind
    The same clips and captions, from whatever archive, give the same folder: it is then reused, not decoded or written.
    Where some clips changed, only those are decoded and only their shards written.
    Raises DataError (nothing is left in ``work_dir``), EnvironmentFailure when disk or network fail, Interrupted.
    """
    if on_bad_clip not in ("raise", "skip"):
        raise ValueError(f"on_bad_clip is {on_bad_clip!r}, expected 'raise' or 'skip'")
    shards_dir = Path(work_dir) / "shards"
    outputs = [Path(path) for path in (work_dir, output_dir) if path is not None]
    with open_source(source, Path(work_dir), should_stop, max_download_bytes, outputs) as container:
        listing = pair_members(container)
        if on_bad_clip == "raise" and not allow_any_dataset_size and len(listing.pairs) > CLIP_COUNT_RANGE[1]:
            raise DataError(f"{container.label}: {_count_problem(len(listing.pairs), allow_any_dataset_size)}")
        earlier = earlier_indices(shards_dir)
        known = read_facts(work_dir) | known_facts(earlier)
        figures: Measured = {}
        facts_of = decoder(known, measure if len(listing.pairs) <= MAX_MEASURED_CLIPS else None, figures)
        kept = KeptBytes(KEPT_BYTES)
        checked = checked_clips(container, listing, facts_of, num_workers, should_stop, kept.keep)
        usable, problems = _sorted_out(checked, len(listing.pairs), report)
        problems |= listing.problems
        left_out = tuple(kind.kept() for kind in listing.left_out)
        sizes = len(usable), on_bad_clip, allow_any_dataset_size
        skipped = settle(container.label, listing.refusals, problems, *sizes, left_out)
        if figures:
            # Ahead of the shards: who finds these decodes nothing, and would measure nothing.
            write_figures(work_dir, read_figures(work_dir) | figures)
        digest = digest_of(*(part for clip, _ in usable for part in identity_of(clip)))
        directory = shards_dir / digest[:16]
        finished = _finished(directory, digest)
        if finished is None:
            pairs = {clip.key: pair for clip, pair in usable}
            read_audio = functools.partial(_read_again, container, pairs, kept, should_stop)
            groups = list(split([clip for clip, _ in usable], max_shard_bytes))
            index = DatasetIndex(directory, digest, (), skipped, left_out=left_out)
            finished = _write(index, groups, read_audio, FinishedShards(earlier), num_workers)
        # Another source of the same clips may have left them, beside other files.
        index = dataclasses.replace(finished, skipped=skipped, left_out=left_out)
        update_report(index)
        return index


def _sorted_out(
    checked: Iterator[tuple[Pair, ClipEntry | None, tuple[str, ...]]],
    total: int,
    report: Callable[[int, int], None] | None,
) -> tuple[list[tuple[ClipEntry, Pair]], dict[str, tuple[str, ...]]]:
    """The good clips, and what is wrong with the others by key."""
    usable, problems = [], {}
    for done, (pair, clip, found) in enumerate(checked, 1):
        if clip is None:
            problems[pair.key] = found
        else:
            usable.append((clip, pair))
        if report:
            report(done, total)
    return usable, problems


def decoder(known: Known, measure: Measure | None = None, figures: Measured | None = None) -> FactsOf:
    """Decodes clips that are not known; what ``measure`` finds in them goes to ``figures``."""

    def facts_of(sha256: str, data: bytes) -> AudioFacts:
        key = sha256, len(data)
        if key in known:
            # An earlier version may have taken it in.
            check_whole(data, known[key].samples)
            return known[key]
        if measure is None:
            return check_audio(data)
        figures[key] = measure(data)
        return figures[key][0]

    return facts_of


def checked_clips(
    container: Container,
    listing: Listing,
    facts_of: FactsOf,
    num_workers: int | None,
    should_stop: Callable[[], bool],
    keep: Callable[[str, bytes], None] = lambda sha256, data: None,
) -> Iterator[tuple[Pair, ClipEntry | None, tuple[str, ...]]]:
    """(pair, clip or None, problems) in order of key; several clips at a time, in bounded memory.

    keep   called with the digest and the audio bytes of every good clip
    """

    def check_stop() -> None:
        if should_stop():
            raise Interrupted(f"{container.label}: stopped while checking clips; run again")

    checked = ordered_map(
        lambda pair: _check(container, pair, facts_of, keep),
        listing.pairs,
        lambda pair: pair.audio.size,
        num_workers,
        check_stop,
    )
    for pair, (clip, problems) in checked:
        yield pair, clip, problems


def _check(
    container: Container, pair: Pair, facts_of: FactsOf, keep: Callable[[str, bytes], None]
) -> tuple[ClipEntry | None, tuple[str, ...]]:
    problems = []
    try:
        caption = read_caption(container, pair.caption)
    except DataError as error:
        problems.append(f"{pair.caption_name}: {error}")
    try:
        data = container.read(pair.audio)
        sha256 = hashlib.sha256(data).hexdigest()
        facts = facts_of(sha256, data)
    except DataError as error:
        problems.append(f"{printable(pair.audio.name)}: {error}")
    if problems:
        return None, tuple(problems)
    keep(sha256, data)
    place = {"shard": "", "audio_offset": 0, "audio_bytes": len(data), "audio_sha256": sha256}
    return ClipEntry(pair.key, extension=pair.extension, caption=caption, **place, **dataclasses.asdict(facts)), ()


def settle(
    label: str,
    refusals: Sequence[str],
    problems: dict[str, tuple[str, ...]],
    usable: int,
    on_bad_clip: str,
    any_size: bool,
    left_out: Sequence[LeftOut] = (),
) -> tuple[str, ...]:
    """Raise all that is wrong as one DataError, or return what is skipped. Faults of the archive are never skipped."""
    bad = [line for key in sorted(problems) for line in problems[key]]
    lines = list(refusals) + (bad if on_bad_clip == "raise" else [])
    low, high = (1, usable) if any_size else CLIP_COUNT_RANGE
    # What is reported will be mended and then counts: the number is a problem of its own only if that cannot help.
    possible = usable + len(problems) if on_bad_clip == "raise" else usable
    if not refusals and (possible < low or usable > high):
        # Where too little is left, what was skipped is the reason.
        lines = [_count_problem(usable, any_size), *bad, *(f"left out: {kind.line()}" for kind in left_out)]
        causes = [kind for kind in left_out if kind.what not in ("caption", "system file")]
        if not possible and len(causes) == 1:
            # A zip of zips, say: one line that says it all.
            lines = [f"found no usable clip, but {causes[0].line()}"]
    if lines:
        hidden = len(lines) - MAX_PROBLEM_LINES
        if hidden > 0:
            lines[MAX_PROBLEM_LINES:] = [f"and {counted(hidden, 'more problem')}"]
        raise DataError("\n".join(f"{label}: {line}" for line in lines))
    return tuple("; ".join(problems[key]) for key in sorted(problems))


def check_count(label: str, count: int, any_size: bool) -> None:
    """Raises DataError when a data set holds too few or too many clips."""
    low, high = (1, count) if any_size else CLIP_COUNT_RANGE
    if not low <= count <= high:
        raise DataError(f"{label}: {_count_problem(count, any_size)}")


def _count_problem(count: int, any_size: bool) -> str:
    if any_size:
        return "found no usable clip; expected audio files, each with a .txt caption of the same name"
    low, high = CLIP_COUNT_RANGE
    found = counted(count, "usable clip")
    return f"found {found}, expected {low} to {high}; set allow_any_dataset_size: true to lift the limits"


def identity_of(clip: ClipEntry) -> tuple[str, str, str, str]:
    """What of a clip a data set's digest covers."""
    return clip.key, clip.extension, clip.audio_sha256, clip.caption


def _finished(directory: Path, digest: str) -> DatasetIndex | None:
    """The index in ``directory`` if it is whole and each shard has its recorded length (reading hashes clips)."""
    try:
        index = DatasetIndex.read(directory)
        whole = all((directory / shard.name).stat().st_size == shard.bytes for shard in index.shards)
    except (DataError, OSError):
        return None
    return index if whole and index.digest == digest else None


def _read_again(
    container: Container, pairs: dict[str, Pair], kept: KeptBytes, should_stop: Callable[[], bool], clip: ClipEntry
) -> bytes:
    """The bytes of a clip that was checked."""
    if should_stop():
        raise Interrupted(f"{container.label}: stopped while writing shards; run again")
    data = kept.take(clip.audio_sha256)
    if data is None:
        data = container.read(pairs[clip.key].audio)
        if hashlib.sha256(data).hexdigest() != clip.audio_sha256:
            raise DataError(f"{container.label}: {pairs[clip.key].audio.name} changed while it was read; run again")
    return data


def _write(
    index: DatasetIndex,
    groups: list[list[ClipEntry]],
    read_audio: Callable[[ClipEntry], bytes],
    earlier: FinishedShards,
    num_workers: int | None,
) -> DatasetIndex:
    """Fill a temporary folder with a shard per group, several at a time, then the index, and rename it.

    index   without clips and shards, its directory the one to be
    A full disk is EnvironmentFailure.
    """
    shards, placed = [], []
    directory, digest = index.directory, index.digest
    with (
        _disk(directory),
        atomic_directory(directory, unless=lambda: _finished(directory, digest) is not None) as temporary,
    ):

        def write(numbered: tuple[int, list[ClipEntry]]) -> tuple[ShardEntry, list[ClipEntry]]:
            number, clips = numbered
            target = temporary / shard_name(number)
            return earlier.reuse(clips, target) or write_shard(target, clips, read_audio)

        # One clip of a shard is in memory at a time.
        for _, (shard, clips) in ordered_map(write, enumerate(groups), lambda _: 0, num_workers):
            shards.append(shard)
            placed += clips
        index = dataclasses.replace(index, directory=temporary, clips=tuple(placed), shards=tuple(shards))
        write_report(index)
        index.write()
    return DatasetIndex.read(directory)


@contextlib.contextmanager
def _disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(f"{directory}: cannot write shards ({error.strerror or error})") from error
