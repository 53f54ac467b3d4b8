"""Shards as a data set: latent shards instead of audio, fetched if remote; shards of either kind to stream."""

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path

from sa3dist.data.latents.shards import MEND, SHARD_PREFIX, LatentShard
from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.data.remote.download import answer
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

# Path of a tar, or URL of one that stays remote; path of its index; the tar's length if it is remote, else 0.
Paths = tuple[str, str, int]


@dataclasses.dataclass(frozen=True)
class LatentDataset(DatasetIndex):
    """The index of a data set that exists as latents only, in ``latent_shards``."""

    latent_shards: tuple[LatentShard, ...] = ()


@dataclasses.dataclass(frozen=True)
class StreamedDataset(DatasetIndex):
    """A data set without an index, so its clips are unknown. ``digest`` is of the shards' names, and sizes if local."""

    urls: tuple[str, ...] = ()
    holds_latents: bool = False


def latent_shards_of(source: str, should_stop: Callable[[], bool] = lambda: False) -> list[str] | None:
    """The latent shards that ``source`` names, as paths and URLs in order; None if it is something else.

    They are recognised by their names, latents-*.tar, whether given one by one, by a pattern in braces or by their
    folder. Raises as ``download`` does when a remote folder cannot be listed.
    """
    return _shards_named(source, is_latent_name, should_stop)


def streamed_shards(source: str, should_stop: Callable[[], bool] = lambda: False) -> StreamedDataset:
    """The shards of any kind ``source`` names. Raises DataError when it names something else, or both kinds."""
    label = redacted(source)
    urls = _shards_named(source, lambda name: _last_part(name).lower().endswith(".tar"), should_stop)
    if urls is None:
        raise DataError(f"{label}: mode: streaming reads shards (.tar, a pattern or a folder of them)")
    kinds = {is_latent_name(url) for url in urls}
    if len(kinds) > 1:
        raise DataError(f"{label}: latent shards and others side by side; stream one kind")
    # Local sizes reveal an exchanged shard; asking a server for all sizes would take too long.
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
        found = tars_on_top(folder) if folder is not None and folder.is_dir() else []
        chosen = [path for path in found if matches(path.name)]
        if not chosen:
            return None
        if len(chosen) < len(found):
            raise DataError(f"{source}: latent shards and others side by side; move one kind elsewhere")
        container = FolderContainer(folder, source)
        shards_on_top(container, folder)
        known = {INDEX_NAME, REPORT_NAME, *(name for path in chosen for name in (path.name, f"{path.stem}.json"))}
        if beside := tuple(member.name for member in container.members if member.name not in known):
            log.warning("%s: left out: %s", source, LeftOut(*BESIDE_SHARDS, len(beside), beside).line())
        return [str(path) for path in chosen]
    # Plain web servers have no folders; what looks like one may be a file of any size.
    if source[:4].lower() == "http" or len(parts) > 1 or Path(address_name(source)).suffix:
        return None
    system, path = filesystem(source)
    if not answer(lambda: system.isdir(path), redacted(source), should_stop):
        return None
    listing = answer(lambda: system.ls(path, detail=False), redacted(source), should_stop)
    found = [system.unstrip_protocol(name) for name in listing if matches(name)]
    return sorted(found) or None


def is_latent_name(part: str) -> bool:
    name = _last_part(part)
    return name.startswith(SHARD_PREFIX) and name.endswith(".tar")


def _last_part(part: str) -> str:
    return address_name(part) if is_remote(part) else Path(part).name


def fetch_latents(parts: list[str], work_dir: Path, should_stop: Callable[[], bool], max_bytes: int) -> list[Paths]:
    """Paths of the shards and their indices; remote indices are downloaded to ``work_dir``/downloads.

    Remote shards stay remote, unless their server sends whole files only: then they are downloaded too, with a warning.
    Raises DataError when one is missing (and removes what was fetched), EnvironmentFailure when the network fails.
    """
    stays: bool | None = None

    def placed(part: str, downloads: Downloads) -> Paths:
        nonlocal stays
        address, query = split_query(part)
        index = address.removesuffix(".tar") + ".json" + query
        if not is_remote(part):
            return str(local_path(part)), str(local_path(index)), 0
        size = look_up(part, should_stop)[2].get("size") or 0
        if stays is None:
            stays = bool(size) and has_ranges(part, size, should_stop)
            if not stays:
                log.warning("%s: the server does not send parts of files, downloading the shards whole", redacted(part))
        tar, size = (part, size) if stays and size else (str(downloads.fetch(part)), 0)
        return tar, str(downloads.fetch(index)), size

    with Downloads(Path(work_dir) / "downloads", should_stop, max_bytes) as downloads:
        return [placed(part, downloads) for part in parts]


def read_latents(
    source: str, paths: list[Paths], cache: ClipCache, should_stop: Callable[[], bool] = lambda: False
) -> LatentDataset:
    """The data set in the shards at ``paths``. Raises DataError when one is damaged, or a folder lacks some.

    cache   of clips read from remote shards
    """
    shards = tuple(
        LatentShard.read(RemoteFile(tar, size, cache, should_stop) if size else Path(tar), Path(index))
        for tar, index, size in paths
    )
    label, first = redacted(source), shards[0]
    if "{" not in source and not split_query(source)[0].endswith(".tar"):
        numbers = {shard.number for shard in shards}
        # Name the first gap: the number of shards comes from a file, and may be anything.
        missing = next((number for number in range(first.of) if number not in numbers), None)
        if missing is not None:
            raise DataError(f"{label}: shard {missing} of {first.of} is not there; copy all of them")
    clips = sorted((found.clip for shard in shards for found in shard.clips), key=lambda clip: clip.key)
    for one, other in zip(clips, clips[1:], strict=False):
        if one.key == other.key:
            raise DataError(f"{label}: clip {one.key} is there twice; {MEND}")
    return LatentDataset(Path(paths[0][1]).parent, dataset_digest(clips), tuple(clips), latent_shards=shards)
