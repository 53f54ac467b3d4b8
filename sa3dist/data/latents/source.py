"""Shards as a data set: latent shards in place of audio, and shards of either kind for streaming mode."""

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from sa3dist.data.latents.shards import REMEDY, SHARD_PREFIX, LatentShard
from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.data.remote.download import query
from sa3dist.data.remote.fetch import Downloads, address_name, filesystem, is_remote, look_up, redacted, split_query
from sa3dist.data.remote.ranges import RemoteFile
from sa3dist.data.source.archive import expand_braces, local_path, shards_on_top, tars_on_top
from sa3dist.data.source.folders import FolderContainer
from sa3dist.data.source.kinds import BESIDE_SHARDS
from sa3dist.data.source.remote_shards import has_ranges
from sa3dist.data.source.shard_split import REPORT_NAME
from sa3dist.errors import DataError
from sa3dist.formats import INDEX_NAME, DatasetIndex, LeftOut, dataset_digest, digest_of

log = logging.getLogger(__name__)

# Path of a tar, or its URL if it ranged remote; path of its index; the tar's length if remote, else 0.
Paths = tuple[str, str, int]


@dataclasses.dataclass(frozen=True)
class LatentDataset(DatasetIndex):
    """The index of a data set of which only latents are given."""

    latent_shards: tuple[LatentShard, ...] = ()


@dataclasses.dataclass(frozen=True)
class StreamedDataset(DatasetIndex):
    """A data set without an index: its clips are not known. ``digest`` covers the shards' names, and sizes if local."""

    urls: tuple[str, ...] = ()
    holds_latents: bool = False


def latent_shards_of(source: str, should_stop: Callable[[], bool] = lambda: False) -> list[str] | None:
    """Paths or URLs of the latent shards at ``source``, in order; None if it is something else.

    Latent shards are recognised by their name, latents-*.tar. ``source`` may name one, a pattern in braces, or a
    folder. Raises like ``download`` if a remote folder cannot be listed.
    """
    return _shards_named(source, is_latent_name, should_stop)


def streamed_shards(source: str, should_stop: Callable[[], bool] = lambda: False) -> StreamedDataset:
    """The shards at ``source``, of either kind. Raises DataError if there are none, or both kinds."""
    label = redacted(source)
    urls = _shards_named(source, lambda name: _last_part(name).lower().endswith(".tar"), should_stop)
    if urls is None:
        raise DataError(f"{label}: mode: streaming reads shards (.tar, a pattern or a folder of them)")
    kinds = {is_latent_name(url) for url in urls}
    if len(kinds) > 1:
        raise DataError(f"{label}: latent shards and others side by side; stream one kind")
    # Sizes reveal a replaced shard. They are left out for remote shards: asking the server for all takes too long.
    local = [url if is_remote(url) else str(local_path(url)) for url in urls]
    facts = [f"{_last_part(url)} {'' if is_remote(url) else os.path.getsize(url)}" for url in local]
    digest = digest_of("streaming", *facts)
    return StreamedDataset(Path(), digest, (), urls=tuple(local), holds_latents=kinds == {True})


def _shards_named(source: str, matches: Callable[[str], bool], should_stop: Callable[[], bool]) -> list[str] | None:
    parts = expand_braces(source)
    if all(map(matches, parts)):
        return parts
    if not is_remote(source):
        folder = local_path(source) if len(parts) == 1 else None
        tars = tars_on_top(folder) if folder is not None and folder.is_dir() else []
        chosen = [path for path in tars if matches(path.name)]
        if not chosen:
            return None
        if len(chosen) < len(tars):
            raise DataError(f"{source}: latent shards and others side by side; move one kind elsewhere")
        container = FolderContainer(folder, source)
        shards_on_top(container, folder)
        known = {INDEX_NAME, REPORT_NAME, *(name for path in chosen for name in (path.name, f"{path.stem}.json"))}
        if other := tuple(member.name for member in container.members if member.name not in known):
            log.warning("%s: left out: %s", source, LeftOut(*BESIDE_SHARDS, len(other), other).line())
        return [str(path) for path in chosen]
    # HTTP servers have no folders; an address that looks like one may be a file of any size.
    if source[:4].lower() == "http" or len(parts) > 1 or Path(address_name(source)).suffix:
        return None
    system, path = filesystem(source)
    if not query(lambda: system.isdir(path), redacted(source), should_stop):
        return None
    listing = query(lambda: system.ls(path, detail=False), redacted(source), should_stop)
    return sorted(system.unstrip_protocol(name) for name in listing if matches(name)) or None


def is_latent_name(part: str) -> bool:
    name = _last_part(part)
    return name.startswith(SHARD_PREFIX) and name.endswith(".tar")


def _last_part(part: str) -> str:
    return address_name(part) if is_remote(part) else Path(part).name


def fetch_latents(parts: list[str], work_dir: Path, should_stop: Callable[[], bool], max_bytes: int) -> list[Paths]:
    """Download remote indices to ``work_dir``/downloads; return the paths of all shards and indices.

    Remote shards are not downloaded unless their server cannot send parts of files, which is logged.
    Raises DataError if a file is missing (downloads are then removed), EnvironmentFailure if the network fails.
    """
    ranged: bool | None = None

    def placed(part: str, downloads: Downloads) -> Paths:
        nonlocal ranged
        address, query = split_query(part)
        index = address.removesuffix(".tar") + ".json" + query
        if not is_remote(part):
            return str(local_path(part)), str(local_path(index)), 0
        size = look_up(part, should_stop)[2].get("size") or 0
        if ranged is None:
            ranged = bool(size) and has_ranges(part, size, should_stop)
            if not ranged:
                log.warning("%s: the server does not send parts of files, downloading the shards whole", redacted(part))
        tar, size = (part, size) if ranged and size else (str(downloads.fetch(part)), 0)
        return tar, str(downloads.fetch(index)), size

    with Downloads(Path(work_dir) / "downloads", should_stop, max_bytes) as downloads:
        return [placed(part, downloads) for part in parts]


def read_latents(
    source: str, paths: list[Paths], cache: ClipCache, should_stop: Callable[[], bool] = lambda: False
) -> LatentDataset:
    """The data set in the shards at ``paths``. Raises DataError if one is damaged, or missing from a folder.

    cache   for the bytes read from remote shards
    """
    shards = tuple(
        LatentShard.read(RemoteFile(tar, size, cache, should_stop) if size else Path(tar), Path(index))
        for tar, index, size in paths
    )
    label, first = redacted(source), shards[0]
    if "{" not in source and not split_query(source)[0].endswith(".tar"):
        numbers = {shard.number for shard in shards}
        # Stop at the first gap: ``of`` comes from a file and may be huge.
        missing = next((number for number in range(first.of) if number not in numbers), None)
        if missing is not None:
            raise DataError(f"{label}: shard {missing} of {first.of} is missing; copy all of them")
    clips = sorted((encoded.clip for shard in shards for encoded in shard.clips), key=lambda clip: clip.key)
    for clip, following in itertools.pairwise(clips):
        if clip.key == following.key:
            raise DataError(f"{label}: clip {clip.key} appears twice; {REMEDY}")
    return LatentDataset(Path(paths[0][1]).parent, dataset_digest(clips), tuple(clips), latent_shards=shards)
