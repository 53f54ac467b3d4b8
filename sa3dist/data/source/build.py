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

# Large enough to stream well, small enough that a damaged one is little lost.
MAX_SHARD_BYTES = 256 << 20
# Larger sets are not measured on the way: their stats would take more than 300 MB of memory.
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
    """Check every clip of ``source`` and write it to ``work_dir``/shards/<digest>/; the audio bytes stay as they are.

    source           path, file:// or fsspec URL of a zip, a folder or WebDataset tars (archive.py)
    on_bad_clip      "raise": one DataError lists all problems; "skip": bad clips are left out and named in .skipped
    output_dir       where the run writes its results; like what earlier runs left, it is no part of the source
    num_workers      threads that decode, which changes no byte of the shards; default: one per core
    measure          decodes in place of ``check_audio``; the stats are kept in ``work_dir`` for ``sa3dist inspect``
    report           called as report(checked, total) after every clip
    should_stop      polled after every clip; when true, Interrupted is raised and nothing stays behind
    The same clips and captions, from whatever archive, give the same folder: it is then reused, not decoded or written.
    Where some clips changed, only those are decoded and only their shards written.
    Raises DataError (nothing is left in ``work_dir``), EnvironmentFailure when disk or network fail, Interrupted.
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
        usable, problems = _sorted_out(checked, total, report)
        problems |= listing.problems
        left_out = tuple(kind.kept() for kind in listing.left_out)
        sizes = len(usable), on_bad_clip, allow_any_dataset_size
        skipped = raise_or_skip(container.label, listing.refusals, problems, *sizes, left_out)
        if stats:
            # Before the shards: whoever finds those decodes nothing, and would measure nothing.
            write_stats(work_dir, read_stats(work_dir) | stats)
        clips = [clip for clip, _ in usable.values()]
        digest = dataset_digest(clips)
        index = DatasetIndex(shards_dir / digest[:16], digest, (), skipped, left_out=left_out)
        finished = _finished(index.directory, digest)
        if finished is None:
            read_audio = functools.partial(_read_again, container, usable, should_stop)
            groups = list(split(clips, max_shard_bytes))
            finished = _write(index, groups, read_audio, FinishedShards(earlier), num_workers)
        # Another source of the same clips may have written them, beside other files.
        index = dataclasses.replace(finished, skipped=skipped, left_out=left_out)
        update_report(index)
        return index


def _sorted_out(
    checked: Iterator[tuple[Pair, ClipEntry | None, tuple[str, ...]]],
    total: int,
    report: Callable[[int, int], None] | None,
) -> tuple[dict[str, tuple[ClipEntry, Pair]], dict[str, tuple[str, ...]]]:
    """The good clips, and what is wrong with the others, by key."""
    usable, problems = {}, {}
    for done, (pair, clip, found) in enumerate(checked, 1):
        if clip is None:
            problems[pair.key] = found
        else:
            usable[pair.key] = clip, pair
        if report:
            report(done, total)
    return usable, problems


def _finished(directory: Path, digest: str) -> DatasetIndex | None:
    """The index in ``directory`` if it is whole and each shard has its recorded length (reading hashes clips)."""
    try:
        index = DatasetIndex.read(directory)
        whole = all((directory / shard.name).stat().st_size == shard.bytes for shard in index.shards)
    except (DataError, OSError):
        return None
    return index if whole and index.digest == digest else None


def _read_again(
    container: Container,
    usable: dict[str, tuple[ClipEntry, Pair]],
    should_stop: Callable[[], bool],
    clip: ClipEntry,
) -> bytes:
    """The audio bytes of a clip that was checked: the system's cache holds what was read a moment ago."""
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
    """Fill a temporary folder with a shard per group, several at a time, then the index, and rename it.

    index   without clips and shards, its directory the one to be
    A full disk is EnvironmentFailure.
    """
    shards, placed = [], []
    directory, digest = index.directory, index.digest
    try:
        with atomic_directory(directory, unless=lambda: _finished(directory, digest) is not None) as temporary:

            def write(numbered: tuple[int, list[ClipEntry]]) -> tuple[ShardEntry, list[ClipEntry]]:
                number, clips = numbered
                target = temporary / shard_name(number)
                return earlier.reuse(clips, target) or write_shard(target, clips, read_audio)

            # One clip of a shard is in memory at a time.
            for _, (shard, clips) in prefetch(write, enumerate(groups), lambda _: 0, num_workers):
                shards.append(shard)
                placed += clips
            index = dataclasses.replace(index, directory=temporary, clips=tuple(placed), shards=tuple(shards))
            write_report(index)
            index.write()
        return DatasetIndex.read(directory)
    except OSError as error:
        raise EnvironmentFailure(f"{directory}: cannot write shards ({error.strerror or error})") from error
