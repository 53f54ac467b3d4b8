"""Remote shards: find them and their index, and read single clips through a bounded cache."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.data.remote.download import download, query, remote_info
from sa3dist.data.remote.fetch import address_name, filesystem, is_remote, look_up, redacted, split_query
from sa3dist.data.remote.ranges import READS, NoRanges, RemoteFile, read_range
from sa3dist.data.source.archive import expand_braces, shards_and_clips
from sa3dist.data.source.index_check import index_faults
from sa3dist.data.source.kinds import BESIDE_SHARDS, extension_of, is_audio
from sa3dist.data.source.shard_split import REPORT_NAME
from sa3dist.errors import DataError
from sa3dist.formats import INDEX_NAME, ClipEntry, DatasetIndex, LeftOut

log = logging.getLogger(__name__)

# A million clips with captions of 500 bytes.
MAX_INDEX_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class RemoteShards:
    """Reads clips by range requests, through a cache.

    urls         shard name -> URL
    file_bytes   shard name -> length
    """

    urls: dict[str, str]
    file_bytes: dict[str, int]
    cache: ClipCache
    should_stop: Callable[[], bool]

    def __call__(self, entry: ClipEntry) -> bytes:
        """The clip's audio bytes, verified. Raises DataError naming shard and clip if they do not match the index."""
        shard = RemoteFile(self.urls[entry.shard], self.file_bytes[entry.shard], self.cache, self.should_stop)
        data = shard.read(entry.audio_offset, entry.audio_bytes, entry.audio_sha256, f"clip {entry.key}")
        if data is None:
            raise DataError(
                f"{shard}, clip {entry.key}: the audio bytes are not the ones in the index, the shard has changed or "
                f"is damaged; write shard and index again"
            )
        return data


def tars_of(source: str, should_stop: Callable[[], bool]) -> list[str] | None:
    """URLs of the shards at a remote ``source``; None if it is local or something else. Empty for an index.json.

    source   URL of one tar, of several with {000..127}, of a folder of tars, or of the index.json next to them, for
             servers that cannot list a folder
    Raises like ``download``.
    """
    if not is_remote(source):
        return None
    parts = expand_braces(source)
    if all(address_name(part).endswith(".tar") for part in parts):
        return parts
    if len(parts) > 1:
        return None
    if address_name(source) == INDEX_NAME:
        return []
    system, path, info = look_up(source, should_stop)
    if info.get("type") != "directory":
        return None
    listing = query(lambda: system.ls(path, detail=True), redacted(source), should_stop)
    types = {PurePosixPath(info["name"]).name: info.get("type") for info in listing}
    tars = sorted(name for name in types if extension_of(name) == "tar")
    if not tars:
        return None
    names = list(types)
    if "directory" in types.values():
        listing = query(lambda: system.find(path), redacted(source), should_stop)
        names = [name[len(path.rstrip("/")) + 1 :] for name in listing]
    for name in filter(is_audio, sorted(names)):
        raise DataError(shards_and_clips(redacted(source), tars[0], name))
    if others := sorted({*names} - {*tars, INDEX_NAME, REPORT_NAME}):
        log.warning("%s: left out: %s", redacted(source), LeftOut(*BESIDE_SHARDS, len(others), tuple(others)).line())
    return [f"{source.rstrip('/')}/{name}" for name in tars]


def find_index(
    source: str, tars: list[str], scratch: Path, should_stop: Callable[[], bool]
) -> tuple[DatasetIndex, dict[str, str]] | None:
    """The index next to the shards, limited to ``tars``, and the URL of each shard; None if there is no suitable one.

    Raises DataError if it is damaged or invalid.
    """
    folders = {_folder(url) for url in tars or [source]}
    if len(folders) > 1 or any(split_query(url)[1] for url in tars):
        return None
    (folder,) = folders
    url = source if not tars else f"{folder}/{INDEX_NAME}"
    try:
        index = _read_index(url, scratch, should_stop)
    except FileNotFoundError as error:
        if tars:
            return None
        raise DataError(f"{error}; or name the .tar files instead") from None
    query = split_query(source)[1] if url is source else ""
    urls = {shard.name: f"{folder}/{shard.name}{query}" for shard in index.shards}
    if tars:
        named = {address_name(tar): tar for tar in tars}
        if not named.keys() <= urls.keys():
            log.warning("%s does not know all of the shards named: reading them without it", redacted(url))
            return None
        urls = named
        index = dataclasses.replace(
            index,
            clips=tuple(clip for clip in index.clips if clip.shard in named),
            shards=tuple(shard for shard in index.shards if shard.name in named),
        )
    return index, urls


def _read_index(url: str, scratch: Path, should_stop: Callable[[], bool]) -> DatasetIndex:
    """Raises FileNotFoundError if there is none, DataError if it is damaged or not an index of sa3dist."""
    system, remote = filesystem(url)
    path = scratch / INDEX_NAME
    for attempt in range(READS):
        path.unlink(missing_ok=True)
        try:
            info = remote_info(system, remote, redacted(url), should_stop)
            download(system, remote, info, path, redacted(url), MAX_INDEX_BYTES, should_stop)
        except DataError as error:
            # Also for "access denied": some servers send it for files that do not exist.
            raise FileNotFoundError(str(error)) from error
        try:
            index = DatasetIndex.read(scratch)
        except DataError as error:
            log.warning("%s: damaged, or not an index of sa3dist (attempt %d)", redacted(url), attempt + 1)
            problem = error
            continue
        for fault in index_faults(index):
            raise DataError(f"{redacted(url)}: {fault}; write it again with sa3dist shard")
        return index
    reason = str(problem).removeprefix(f"{path}: ").partition(";")[0]
    raise DataError(f"{redacted(url)}: {reason}; write it again with sa3dist shard")


def has_ranges(url: str, file_bytes: int, should_stop: Callable[[], bool]) -> bool:
    """Whether the server of ``url`` sends parts of files. Raises like ``read_range`` for other failures."""
    with contextlib.suppress(NoRanges):
        # The last byte, to notice a server that ignores the range and sends the file from the start.
        read_range(url, file_bytes, file_bytes - 1, 1, should_stop)
        return True
    return False


def check_sizes(index: DatasetIndex, urls: dict[str, str], should_stop: Callable[[], bool]) -> None:
    """Raise DataError if a shard is missing or its length differs from the index."""
    for shard in index.shards:
        size = look_up(urls[shard.name], should_stop)[2].get("size")
        if size is not None and size != shard.bytes:
            raise DataError(
                f"{redacted(urls[shard.name])}: {size} bytes, its index says {shard.bytes}; write shard and index again"
            )


def _folder(url: str) -> str:
    return split_query(url)[0].rpartition("/")[0]
