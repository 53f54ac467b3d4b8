"""Write the checked clips of a source as WebDataset tars with an index."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from sa3dist.data.remote.fetch import MAX_TOTAL_BYTES
from sa3dist.data.source import check
from sa3dist.data.source.archive import open_container
from sa3dist.data.source.check import (
    Measure,
    check_count,
    checked_clips,
    decoder,
    earlier_indices,
    known_facts,
    raise_or_skip,
)
from sa3dist.data.source.clip_stats import read_facts, read_stats, write_stats
from sa3dist.data.source.containers import Container
from sa3dist.data.source.pairing import Pair, pair_members
from sa3dist.data.source.prefetch import prefetch
from sa3dist.data.source.shard_split import FinishedShards, split, update_report, write_report
from sa3dist.data.source.tar_writer import shard_name, write_shard
from sa3dist.errors import DataError, EnvironmentFailure, Interrupted
from sa3dist.formats import ClipEntry, DatasetIndex, ShardEntry, atomic_directory, dataset_digest

# Large enough to stream well, small enough that a damaged one costs little.
MAX_SHARD_BYTES = 256 << 20
# Larger data sets are not measured here: their statistics would take more than 300 MB of memory.
MAX_MEASURED_CLIPS = 20_000


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
    """Check every clip of ``source`` and write it to ``work_dir``/shards/<digest>/, audio bytes unchanged.

    source           path, file:// or fsspec URL of a zip, a folder or WebDataset tars (archive.py)
    on_bad_clip      "raise": one DataError lists all problems; "skip": bad clips are left out and named in .skipped
    output_dir       the run's results; not part of the source, like results of earlier runs
    num_workers      decoding threads; does not affect the shards; default: one per core
    measure          replaces ``check_audio``; the statistics are stored in ``work_dir`` for ``sa3dist inspect``
    report           called as report(checked, total) after every clip
    should_stop      polled after every clip; if true, Interrupted is raised and nothing is written
    The same clips and captions, from any kind of source, give the same folder, which is then reused. If some clips
    changed, only those are decoded and only their shards written.
    Raises DataError (nothing is left in ``work_dir``), EnvironmentFailure if disk or network fail, Interrupted.
    """
    shards_dir = Path(work_dir) / "shards"
    outputs = [Path(path) for path in (work_dir, output_dir) if path is not None]
    with open_container(source, Path(work_dir), should_stop, max_download_bytes, outputs) as container:
        listing = pair_members(container)
        total = len(listing.pairs)
        if on_bad_clip == "raise" and total > check.CLIP_COUNT_RANGE[1]:
            check_count(container.label, total, allow_any_dataset_size)
        earlier, stats = earlier_indices(shards_dir), {}
        known = read_facts(work_dir) | known_facts(earlier)
        facts_of = decoder(known, measure if total <= MAX_MEASURED_CLIPS else None, stats)
        checked = checked_clips(container, listing, facts_of, num_workers, should_stop)
        usable, problems = _split_usable(checked, total, report)
        problems |= listing.problems
        left_out = tuple(kind.kept() for kind in listing.left_out)
        sizes = len(usable), on_bad_clip, allow_any_dataset_size
        skipped = raise_or_skip(container.label, listing.refusals, problems, *sizes, left_out)
        if stats:
            # Before the shards: a run that finds finished shards decodes, and so measures, nothing.
            write_stats(work_dir, read_stats(work_dir) | stats)
        clips = [clip for clip, _ in usable.values()]
        digest = dataset_digest(clips)
        index = DatasetIndex(shards_dir / digest[:16], digest, (), skipped, left_out=left_out)
        finished = _finished(index.directory, digest)
        if finished is None:
            read_audio = functools.partial(_read_again, container, usable, should_stop)
            groups = list(split(clips, max_shard_bytes))
            finished = _write(index, groups, read_audio, FinishedShards(earlier), num_workers)
        # The shards may come from another source of the same clips, with other files left out.
        index = dataclasses.replace(finished, skipped=skipped, left_out=left_out)
        update_report(index)
        return index


def _split_usable(
    checked: Iterator[tuple[Pair, ClipEntry | None, tuple[str, ...]]],
    total: int,
    report: Callable[[int, int], None] | None,
) -> tuple[dict[str, tuple[ClipEntry, Pair]], dict[str, tuple[str, ...]]]:
    """The usable clips, and the problems of the others, by key."""
    usable, problems = {}, {}
    for done, (pair, clip, faults) in enumerate(checked, 1):
        if clip is None:
            problems[pair.key] = faults
        else:
            usable[pair.key] = clip, pair
        if report:
            report(done, total)
    return usable, problems


def _finished(directory: Path, digest: str) -> DatasetIndex | None:
    """The index in ``directory`` if every shard has its recorded length; reading a clip verifies its digest."""
    try:
        index = DatasetIndex.read(directory)
        complete = all((directory / shard.name).stat().st_size == shard.bytes for shard in index.shards)
    except (DataError, OSError):
        return None
    return index if complete and index.digest == digest else None


def _read_again(
    container: Container,
    usable: dict[str, tuple[ClipEntry, Pair]],
    should_stop: Callable[[], bool],
    clip: ClipEntry,
) -> bytes:
    """The audio bytes of a checked clip, usually still in the page cache."""
    if should_stop():
        raise Interrupted(f"{container.label}: stopped while writing shards; run again")
    member = usable[clip.key][1].audio
    data = container.read(member)
    if hashlib.sha256(data).hexdigest() != clip.audio_sha256:
        raise DataError(f"{container.label}: {member.name} changed while it was read; run again")
    return data


def _write(
    index: DatasetIndex,
    groups: list[list[ClipEntry]],
    read_audio: Callable[[ClipEntry], bytes],
    earlier: FinishedShards,
    num_workers: int | None,
) -> DatasetIndex:
    """Write a shard per group, several in parallel, and the index to a temporary folder; then rename it.

    index   without clips and shards; its directory is the target
    Raises EnvironmentFailure if the disk is full.
    """
    shards, placed = [], []
    directory, digest = index.directory, index.digest
    try:
        with atomic_directory(directory, unless=lambda: _finished(directory, digest) is not None) as temporary:

            def write(numbered: tuple[int, list[ClipEntry]]) -> tuple[ShardEntry, list[ClipEntry]]:
                number, clips = numbered
                target = temporary / shard_name(number)
                return earlier.reuse(clips, target) or write_shard(target, clips, read_audio)

            # Size 0: write_shard holds only one clip in memory.
            for _, (shard, clips) in prefetch(write, enumerate(groups), lambda _: 0, num_workers):
                shards.append(shard)
                placed += clips
            index = dataclasses.replace(index, directory=temporary, clips=tuple(placed), shards=tuple(shards))
            write_report(index)
            index.write()
        return DatasetIndex.read(directory)
    except OSError as error:
        raise EnvironmentFailure(f"{directory}: cannot write shards ({error.strerror or error})") from error
