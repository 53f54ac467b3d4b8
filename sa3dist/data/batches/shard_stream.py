"""Clips from shards without an index: one webdataset pipeline per segment; every clip is checked."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import socket
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sa3dist.data.batches.worker_shards import StreamCursor, WorkerShards
from sa3dist.data.latents.shards import FLIPPED, LATENTS, PROMPT, REMEDY, SHARD_INDEX_VERSION, Encoders
from sa3dist.data.remote.download import download
from sa3dist.data.remote.fetch import is_remote, look_up, redacted
from sa3dist.data.source.audio import check_audio
from sa3dist.data.source.captions import caption_text
from sa3dist.data.source.containers import TAR_FAULTS, behind_end, short_reason
from sa3dist.data.source.kinds import AUDIO_EXTENSIONS
from sa3dist.errors import DataError, EnvironmentFailure
from sa3dist.formats import ClipEntry, is_sealed, remove_stale

# Types of members that have no data, whatever size their header gives.
_NO_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)

# A clip's members by extension, as grouped by webdataset.
TarSample = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ShardClip:
    """One clip as read from a shard.

    shard     name for messages
    content   bytes of "audio" (a file), or of LATENTS, FLIPPED and PROMPT
    sha256    digests of ``content``, if it is latents
    """

    clip: ClipEntry
    shard: str
    content: dict[str, bytes]
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)

    def verified(self, kind: str, what: str) -> bytes:
        """The bytes of one kind. Raises EnvironmentFailure, naming shard and ``what``, if they are damaged."""
        data = self.content[kind]
        if hashlib.sha256(data).hexdigest() != self.sha256[kind]:
            raise EnvironmentFailure(f"{self.shard}: the {what} do not match their digest; {REMEDY}")
        return data


@dataclasses.dataclass(frozen=True)
class ShardSource:
    """The shards of a streamed data set.

    urls        paths or URLs, in order
    encoders    encoders that must have written the latents; None if the shards hold audio
    scratch     folder for a remote shard while it is read
    max_bytes   limit of one download
    """

    urls: tuple[str, ...]
    encoders: Encoders | None
    scratch: Path
    max_bytes: int

    def clips(
        self, worker: WorkerShards, cursor: StreamCursor, buffer: int, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[ShardClip, StreamCursor, bool]]:
        """The endless clips of a worker from its cursor on: (clip, cursor after it, whether it is a repeat).

        buffer   size of the shuffle buffer, in clips
        Raises DataError or EnvironmentFailure, naming the shard, if one cannot be used.
        """
        epoch, begin, skip = cursor
        while True:
            segments, borrowed = worker.segments(epoch)
            for number in range(begin, len(segments)):
                shuffle = random.Random(worker.shuffle_seed(epoch, number))
                urls = [self.urls[shard] for shard in segments[number]]
                for used, clip in enumerate(self._segment(urls, buffer, shuffle, worker, should_stop), start=1):
                    if used > skip:
                        yield clip, StreamCursor(epoch, number, used), borrowed or epoch > 0
                skip = 0
            epoch, begin = epoch + 1, 0

    def _segment(
        self,
        urls: list[str],
        buffer: int,
        shuffle: random.Random,
        worker: WorkerShards,
        should_stop: Callable[[], bool],
    ) -> Iterator[ShardClip]:
        import webdataset

        # Unique per process: other runs may read the same shards.
        process = f"{socket.gethostname()}-{os.getpid()}"
        scratch = self.scratch / f"{worker.dist_rank}-{worker.number}-{process}.part"
        current_shard = ""

        def opened(sources: Iterable[TarSample]) -> Iterator[TarSample]:
            nonlocal current_shard
            for source in sources:
                current_shard = redacted(source["url"])
                with self._open(source["url"], scratch, should_stop) as tar:
                    check_tar(tar, current_shard)
                    yield {**source, "stream": tar}

        clips = webdataset.DataPipeline(
            webdataset.SimpleShardList(urls),
            opened,
            webdataset.tariterators.tar_file_expander,
            webdataset.tariterators.group_by_keys,
            audio_clips if self.encoders is None else lambda samples: latent_clips(samples, self.encoders),
            webdataset.shuffle(buffer, initial=buffer, rng=shuffle),
        )
        seen: set[str] = set()
        try:
            for clip in clips:
                seen.add(clip.shard)
                yield clip
        except TAR_FAULTS as error:
            reason = short_reason(error.args[0] if error.args else error)
            raise EnvironmentFailure(f"{current_shard}: no readable shard ({reason}); make or copy it again") from error
        for url in urls:
            # A worker whose shards are all empty would search for a clip for ever.
            if redacted(url) not in seen:
                raise DataError(f"{redacted(url)}: holds no clip; leave it out")

    @contextlib.contextmanager
    def _open(self, url: str, scratch: Path, should_stop: Callable[[], bool]) -> Iterator[BinaryIO]:
        if not is_remote(url):
            with open(url, "rb") as tar:
                yield tar
            return
        # Start afresh: a file left by a killed run may hold another version of the shard.
        scratch.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(scratch.parent.glob("*.part"))
        scratch.unlink(missing_ok=True)
        try:
            system, path, info = look_up(url, should_stop)
            download(system, path, info, scratch, redacted(url), self.max_bytes, should_stop)
            with scratch.open("rb") as tar:
                yield tar
        finally:
            scratch.unlink(missing_ok=True)


def check_tar(tar: BinaryIO, label: str) -> None:
    """Check all headers and seek back to the start. Raises EnvironmentFailure at the first damaged one.

    Raises DataError if another tar follows it.

    tarfile takes a damaged header for the end of the archive, and would silently skip the rest.
    """
    end = tar.seek(0, 2)
    offset = 0
    while offset < end:
        tar.seek(offset)
        header = tar.read(tarfile.BLOCKSIZE)
        if not any(header):
            break
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise EnvironmentFailure(
                f"{label}: no plain tar, or damaged at byte {offset} ({error}); make or copy it again"
            ) from error
        blocks = 0 if info.type in _NO_DATA else -(-info.size // tarfile.BLOCKSIZE)
        offset += tarfile.BLOCKSIZE * (1 + blocks)
    if offset > end:
        raise EnvironmentFailure(f"{label}: ends after {end} of {offset} bytes; make or copy it again")
    if more := behind_end(tar, offset):
        raise DataError(f"{label}: {more}")
    tar.seek(0)


def latent_clips(samples: Iterable[TarSample], encoders: Encoders) -> Iterator[ShardClip]:
    """Clips of latent shards, each with its caption's features. Raises if a clip is missing, damaged or foreign."""
    shard, count, of = "", 0, 0
    prompts: dict[str, tuple[bytes, str]] = {}
    for sample in samples:
        if sample["__url__"] != shard:
            _check_position(shard, count, of)
            shard, count, prompts = sample["__url__"], 0, {}
        facts = _facts(sample, encoders)
        _check_position(shard, count, facts.pop("position"))
        of, sha256 = facts.pop("of"), facts.pop("sha256")
        clip = ClipEntry(**facts)
        try:
            content = {kind: sample[f"{kind}.safetensors"] for kind in sha256}
        except KeyError as error:
            raise EnvironmentFailure(f"{redacted(shard)}, clip {clip.key}: has no {error.args[0]}; {REMEDY}") from error
        if PROMPT in content:
            prompts[clip.caption] = content[PROMPT], sha256[PROMPT]
        content[PROMPT], sha256[PROMPT] = prompts[clip.caption]
        count += 1
        yield ShardClip(clip, redacted(shard), content, sha256)
    _check_position(shard, count, of)


def _facts(sample: TarSample, encoders: Encoders) -> dict[str, Any]:
    shard = redacted(sample["__url__"])
    data = sample.get("json", b"")
    if not is_sealed(data):
        raise EnvironmentFailure(f"{shard}, clip {sample['__key__']}: its .json is missing or damaged; {REMEDY}")
    facts = json.loads(data)
    del facts["self_sha256"]
    if facts.pop("version", None) != SHARD_INDEX_VERSION:
        raise DataError(f"{shard}: written by another version of sa3dist; encode the audio again")
    difference = encoders.difference(Encoders(**facts.pop("encoders")))
    if difference:
        raise DataError(f"{shard}: encoded with {difference}; give the model it was encoded with, or the audio")
    if not {LATENTS, FLIPPED} <= facts["sha256"].keys():
        raise EnvironmentFailure(f"{shard}, clip {facts['key']}: lacks a polarity; {REMEDY}")
    return facts


def _check_position(shard: str, count: int, expected: int) -> None:
    if count != expected:
        raise EnvironmentFailure(f"{redacted(shard)}: clip {min(count, expected)} is not in its place; {REMEDY}")


def audio_clips(samples: Iterable[TarSample]) -> Iterator[ShardClip]:
    """Clips of audio shards with their captions. Raises DataError, naming shard and clip, if one cannot be used."""
    for sample in samples:
        shard, key = redacted(sample["__url__"]), sample["__key__"]
        sounds = [extension for extension in AUDIO_EXTENSIONS if extension in sample]
        captions = [extension for extension in ("txt", "json") if extension in sample]
        try:
            if len(sounds) != 1 or not captions:
                raise DataError("expected one audio file and a caption (.txt or .json) of the same name")
            data = sample[sounds[0]]
            caption = caption_text(sample[captions[0]], as_json=captions[0] == "json")
            facts = dataclasses.asdict(check_audio(data))
        except DataError as error:
            raise DataError(f"{shard}, clip {key}: {error}") from error
        place = {"shard": "", "audio_offset": 0, "audio_bytes": len(data), "audio_sha256": ""}
        clip = ClipEntry(key, extension=sounds[0], caption=caption, **place, **facts)
        yield ShardClip(clip, shard, {"audio": data})
