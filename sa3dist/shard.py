"""Stage one: the clips a run trains on. Audio to shard, remote shards, latent shards, or a stream without index."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sa3dist.data.latents.source import (
    LatentDataset,
    Paths,
    StreamedDataset,
    fetch_latents,
    latent_shards_of,
    read_latents,
    streamed_shards,
)
from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.data.remote.fetch import redacted
from sa3dist.data.source import build, remote_index
from sa3dist.data.source.archive import check_local
from sa3dist.errors import DataError, counted, span
from sa3dist.formats import DatasetIndex
from sa3dist.inspection.measure import measure_clip
from sa3dist.progress import progress
from sa3dist.runtime.process_group import Group, main_process_first, run_on_all_ranks
from sa3dist.runtime.signals import StopRequest
from sa3dist.settings import Settings

log = logging.getLogger(__name__)


def check_sources(settings: Settings) -> None:
    """Raises DataError when audio_data_url, or the source in ``validation``, is a local path that does not exist."""
    check_local(settings.audio_data_url)
    if (beside := settings.validation_source) is not None:
        try:
            check_local(beside)
        except DataError as problem:
            raise DataError(f"validation: {problem}; clips of the data set are named in a list, [{beside}]") from None


def open_validation(settings: Settings, group: Group, stop: StopRequest) -> DatasetIndex | None:
    """The data set that ``validation`` names, opened like the training set; None where it names none."""
    if settings.validation_source is None:
        return None
    # A validation set may have fewer clips than a training set.
    changes = {"audio_data_url": settings.validation_source, "allow_any_dataset_size": True}
    try:
        return open_dataset(settings.model_copy(update=changes), group, stop, name="validation")
    except DataError as problem:
        raise DataError(f"validation: {problem}") from problem


def open_dataset(
    settings: Settings, group: Group, stop: StopRequest, measure: build.Measure | None = None, name: str = "dataset"
) -> DatasetIndex:
    """The data set of ``audio_data_url``: rank 0 prepares it if needed, every rank reads it.

    measure   as in ``build_shards``        name   of the data set, unique within a run
    Raises what failed on any rank, on every rank.
    """
    if settings.mode == "streaming":
        return _streamed(settings, group, stop)
    if settings.validation:
        # The pass that decodes the clips also finds which ones sound alike.
        measure = measure or measure_clip
    should_stop = group.liveness.counting(stop.requested)
    latents = main_process_first(group, f"find-{name}", lambda: _find_latents(settings, should_stop, name), stop)
    if latents is not None:
        return run_on_all_ranks(group, f"read-{name}", lambda: _read_latents(settings, latents, should_stop), stop)

    def build() -> dict[str, Any]:
        with progress("check clips", 1, shown=True) as update:
            index, urls = _index(settings, should_stop, measure, lambda done, total: update(done, total=total))
        length = span(sum(clip.seconds for clip in index.clips))
        log.info("%s: %s, %s, in %s", name, counted(len(index.clips), "clip"), length, index.directory)
        for clip in index.skipped:
            log.warning("skipped: %s", clip)
        for kind in index.left_out:
            log.warning("left out: %s", kind.line())
        return {"directory": str(index.directory), "skipped": index.skipped, "urls": urls}

    built = main_process_first(group, f"shard-{name}", build, stop)
    # Skipped clips belong to this run's source: another source with the same good clips may share the shards.
    index = dataclasses.replace(DatasetIndex.read(Path(built["directory"])), skipped=tuple(built["skipped"]))
    if built["urls"]:
        index = remote_index.attach(index, built["urls"], settings.work_dir, settings.cache_bytes, stop.requested)
    return index


def _index(
    settings: Settings,
    should_stop: Callable[[], bool],
    measure: build.Measure | None,
    report: Callable[[int, int], None],
) -> tuple[DatasetIndex, dict[str, str]]:
    """The data set's index, and the URLs of its shards where they stay remote."""
    limits = ("on_bad_clip", "allow_any_dataset_size", "max_download_bytes")
    options = {key: getattr(settings, key) for key in limits} | {"report": report, "should_stop": should_stop}
    where = settings.audio_data_url, settings.work_dir
    remote = remote_index.index_remote(*where, cache_bytes=settings.cache_bytes, **options)
    if remote is not None:
        return remote
    return build.build_shards(*where, output_dir=settings.output_dir, measure=measure, **options), {}


def _streamed(settings: Settings, group: Group, stop: StopRequest) -> StreamedDataset:
    def find() -> dict[str, Any]:
        index = streamed_shards(settings.audio_data_url, stop.requested)
        return {"digest": index.digest, "urls": index.urls, "holds_latents": index.holds_latents}

    found = main_process_first(group, "find-shards", find, stop)
    index = StreamedDataset(Path(), clips=(), **{**found, "urls": tuple(found["urls"])})
    log.info("streaming %s of %s", counted(len(index.urls), "shard"), "latents" if index.holds_latents else "audio")
    return index


def _find_latents(settings: Settings, should_stop: Callable[[], bool], name: str) -> list[Paths] | None:
    parts = latent_shards_of(settings.audio_data_url, should_stop)
    if parts is None:
        return None
    paths = fetch_latents(parts, settings.work_dir, should_stop, settings.max_download_bytes)
    index = _read_latents(settings, paths, should_stop)
    build.check_count(redacted(settings.audio_data_url), len(index.clips), settings.allow_any_dataset_size)
    log.info("%s: %s as latents in %s", name, counted(len(index.clips), "clip"), counted(len(paths), "shard"))
    return paths


def _read_latents(settings: Settings, paths: list[Paths], should_stop: Callable[[], bool]) -> LatentDataset:
    cache = ClipCache(settings.work_dir / "clip-cache", settings.cache_bytes)
    return read_latents(settings.audio_data_url, paths, cache, should_stop)
