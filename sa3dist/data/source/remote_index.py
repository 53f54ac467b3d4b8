"""The index of shards that stay remote: the one stored with them, or one made by reading each shard once."""

import dataclasses
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.data.remote.download import version_of
from sa3dist.data.remote.fetch import MAX_TOTAL_BYTES, Downloads, address_name, look_up, redacted
from sa3dist.data.source.check import Known, checked_clips, decoder, earlier_indices, known_facts, raise_or_skip
from sa3dist.data.source.containers import TarContainer
from sa3dist.data.source.pairing import pair_members
from sa3dist.data.source.remote_shards import RemoteShards, check_sizes, find_index, has_ranges, tars_of
from sa3dist.data.source.shard_split import write_report
from sa3dist.formats import ClipEntry, DatasetIndex, LeftOut, ShardEntry, atomic_directory, dataset_digest, digest_of

log = logging.getLogger(__name__)


def index_remote(
    source: str,
    work_dir: Path,
    *,
    on_bad_clip: str = "raise",
    allow_any_dataset_size: bool = False,
    max_download_bytes: int = MAX_TOTAL_BYTES,
    cache_bytes: int = 64 << 30,
    report: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[DatasetIndex, dict[str, str]] | None:
    """Index of remote WebDataset shards, written to ``work_dir``/shards, and the URL of each.

    Without an index next to them, every shard is downloaded once, checked as in ``build_shards``, and removed; its
    clips stay in the cache as far as they fit. Known shards are not read again.
    Returns None if ``source`` is local, is not shards, or its server cannot send parts of files (which is logged).
    cache_bytes   size of the clip cache
    report        called as report(shards read, all shards)
    Raises like ``build_shards``.
    """
    work_dir, limits = Path(work_dir), (on_bad_clip, allow_any_dataset_size)
    tars = tars_of(source, should_stop)
    if tars is None:
        return None
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".index-", suffix=".tmp", dir=work_dir) as scratch:
        stored = find_index(source, tars, Path(scratch), should_stop)
    if not _sends_ranges(stored, tars, should_stop):
        log.warning("%s: the server does not send parts of files, downloading the shards whole", redacted(source))
        return None
    if stored is not None:
        index, urls = stored
        check_sizes(index, urls, should_stop)
        skipped = raise_or_skip(redacted(source), (), {}, len(index.clips), *limits)
        return _publish(dataclasses.replace(index, skipped=skipped), work_dir), urls
    log.info("%s: no index next to the shards, reading all of them once", redacted(source))
    downloads = Downloads(work_dir / "downloads", should_stop, max_download_bytes)
    cache = ClipCache(work_dir / "clip-cache", cache_bytes)
    return _Indexer(source, tars, work_dir, downloads, cache, should_stop).run(limits, report)


def attach(
    index: DatasetIndex, urls: dict[str, str], work_dir: Path, cache_bytes: int, should_stop: Callable[[], bool]
) -> DatasetIndex:
    """The index with a reader that fetches clips from ``urls``."""
    sizes = {shard.name: shard.bytes for shard in index.shards}
    cache = ClipCache(Path(work_dir) / "clip-cache", cache_bytes)
    return dataclasses.replace(index, reader=RemoteShards(urls, sizes, cache, should_stop))


def _sends_ranges(
    stored: tuple[DatasetIndex, dict[str, str]] | None, tars: list[str], should_stop: Callable[[], bool]
) -> bool:
    if stored is not None:
        index, urls = stored
        return not index.shards or has_ranges(urls[index.shards[0].name], index.shards[0].bytes, should_stop)
    size = look_up(tars[0], should_stop)[2].get("size")
    return bool(size) and has_ranges(tars[0], size, should_stop)


def _publish(index: DatasetIndex, work_dir: Path) -> DatasetIndex:
    """Write the index to a folder named after the clips and their positions."""
    digest = dataset_digest(index.clips)
    places = digest_of(*(f"{clip.shard} {clip.audio_offset}" for clip in index.clips))
    directory = work_dir / "shards" / f"{digest[:16]}-{places[:8]}"
    index = dataclasses.replace(index, directory=directory, digest=digest)
    if DatasetIndex.find(directory) != index:
        with atomic_directory(directory, unless=lambda: DatasetIndex.find(directory) == index) as temporary:
            inside = dataclasses.replace(index, directory=temporary)
            inside.write()
            write_report(inside)
    return index


class _Indexer:
    """Reads each shard once to index it; the index of each shard is stored on disk under the shard's version."""

    def __init__(
        self,
        source: str,
        tars: list[str],
        work_dir: Path,
        downloads: Downloads,
        cache: ClipCache,
        should_stop: Callable[[], bool],
    ) -> None:
        self._label, self._work_dir, self._should_stop = redacted(source), work_dir, should_stop
        self._downloads, self._cache = downloads, cache
        names = [address_name(tar) for tar in tars]
        if len(set(names)) < len(names):
            names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
        self._urls = dict(zip(names, tars, strict=True))
        self._refusals: list[str] = []
        self._problems: dict[str, tuple[str, ...]] = {}

    def run(self, limits: tuple[str, bool], report: Callable[[int, int], None]) -> tuple[DatasetIndex, dict[str, str]]:
        """limits: on_bad_clip and allow_any_dataset_size, as for ``index_remote``."""
        known = known_facts(earlier_indices(self._work_dir / "shards"))
        clips: list[ClipEntry] = []
        shards: list[ShardEntry] = []
        left_out: list[LeftOut] = []
        with self._downloads:
            for done, (name, url) in enumerate(self._urls.items(), 1):
                part = self._part(name, url, known)
                clips += part.clips
                shards += part.shards
                for kind in part.left_out:
                    left_out.append(dataclasses.replace(kind, names=tuple(f"{name}/{file}" for file in kind.names)))
                self._problems |= {f"{name} {line}": (f"{name}, {line}",) for line in part.skipped}
                report(done, len(self._urls))
            kinds = _merged(left_out)
            skipped = raise_or_skip(self._label, self._refusals, self._problems, len(clips), *limits, kinds)
        filled = {clip.shard for clip in clips}
        shards = [shard for shard in shards if shard.name in filled]
        index = DatasetIndex(self._work_dir, "", _unique(clips), skipped, tuple(shards), left_out=kinds)
        return _publish(index, self._work_dir), self._urls

    def _part(self, name: str, url: str, known: Known) -> DatasetIndex:
        """The index of one shard; ``skipped`` has a line for each bad clip."""
        version = version_of(look_up(url, self._should_stop)[2])
        key = digest_of(name, redacted(url), json.dumps(version, sort_keys=True))
        directory = self._work_dir / "remote" / key[:16]
        if version and (part := DatasetIndex.find(directory)) is not None:
            return part
        log.info("%s: reading it", redacted(url))
        refused = len(self._refusals)
        with self._downloads.borrowed(url) as local:
            part = self._checked(local, name, url, known)
        if version and len(self._refusals) == refused:
            with atomic_directory(directory) as temporary:
                dataclasses.replace(part, directory=temporary, digest=key).write()
        return part

    def _checked(self, local: Path, name: str, url: str, known: Known) -> DatasetIndex:
        clips, skipped = [], []
        with TarContainer([local], redacted(url)) as container:
            listing = pair_members(container)
            self._refusals += [f"{name}, {line}" for line in listing.refusals]
            skipped += ["; ".join(lines) for lines in listing.problems.values()]
            checked = checked_clips(container, listing, decoder(known), None, self._should_stop, self._cache.put)
            for pair, clip, problems in checked:
                if clip is None:
                    skipped.append("; ".join(problems))
                else:
                    # A TarContainer's handle: path of the tar, and offset in it.
                    _, offset = pair.audio.handle
                    clips.append(dataclasses.replace(clip, shard=name, audio_offset=offset))
        # Downloads are named <sha256>-<name>.
        shard = ShardEntry(name, local.stat().st_size, local.name[:64])
        left_out = tuple(kind.kept() for kind in listing.left_out)
        return DatasetIndex(self._work_dir, "", tuple(clips), tuple(sorted(skipped)), (shard,), left_out=left_out)


def _unique(clips: list[ClipEntry]) -> tuple[ClipEntry, ...]:
    """Sorted by key. If two shards share a key, all keys are prefixed with their shard's name."""
    if clips and max(Counter(clip.key for clip in clips).values()) > 1:
        clips = [dataclasses.replace(clip, key=f"{PurePosixPath(clip.shard).stem}/{clip.key}") for clip in clips]
    return tuple(sorted(clips, key=lambda clip: clip.key))


def _merged(kinds: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """Merge entries of the same kind."""
    merged: dict[tuple[str, str], LeftOut] = {}
    for kind in kinds:
        before = merged.get((kind.what, kind.why), LeftOut(kind.what, kind.why, 0))
        names = before.names + kind.names
        merged[kind.what, kind.why] = LeftOut(kind.what, kind.why, before.count + kind.count, names).kept()
    return tuple(merged[key] for key in sorted(merged))
