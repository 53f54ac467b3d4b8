"""From shards to clips without an index: a webdataset pipeline per segment, every clip checked on its way."""

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
from sa3dist.data.latents.shards import FLIPPED, LATENTS, MEND, PROMPT, SHARD_INDEX_VERSION, Encoders
from sa3dist.data.remote.download import download
from sa3dist.data.remote.fetch import is_remote, look_up, redacted
from sa3dist.data.source.audio import check_audio
from sa3dist.data.source.captions import caption_text
from sa3dist.data.source.containers import TAR_FAULTS, short_reason
from sa3dist.data.source.kinds import AUDIO_EXTENSIONS
from sa3dist.errors import DataError, EnvironmentFailure
from sa3dist.formats import ClipEntry, is_sealed, remove_stale

# Members without data, whatever their header says.
_NO_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)

# A clip's members by extension, as webdataset groups them.
TarSample = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ShardClip:
    """One clip as it came: encoded audio bytes, or the bytes of LATENTS, FLIPPED and PROMPT with their digests.

    shard   for messages
    """

    clip: ClipEntry
    shard: str
    content: dict[str, bytes]
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)

    def verified(self, kind: str, what: str) -> bytes:
        """Raises EnvironmentFailure, naming shard and ``what``, when the bytes are not as written."""
        data = self.content[kind]
        if hashlib.sha256(data).hexdigest() != self.sha256[kind]:
            raise EnvironmentFailure(f"{self.shard}: the {what} do not match their digest; {MEND}")
        return data


@dataclasses.dataclass(frozen=True)
class ShardSource:
    """The shards of a set that is streamed.

    urls       paths or URLs, in order
    encoders   what must have written latents; None where the shards hold audio
    scratch    folder where a remote shard lies while it is read
    """

    urls: tuple[str, ...]
    encoders: Encoders | None
    scratch: Path
    max_bytes: int

    def clips(
        self, worker: WorkerShards, cursor: StreamCursor, buffer: int, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[ShardClip, StreamCursor, bool]]:
        """The endless clips of a worker from its cursor on: (clip, cursor behind it, whether it is a repeat).

        buffer   clips the shuffle mixes
        Raises DataError or EnvironmentFailure, naming the shard, when one cannot be used.
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

        # The place of another run on the same shards is another one.
        mine = f"{socket.gethostname()}-{os.getpid()}"
        scratch = self.scratch / f"{worker.dist_rank}-{worker.number}-{mine}.part"
        reading = [""]

        def opened(sources: Iterable[TarSample]) -> Iterator[TarSample]:
            for source in sources:
                reading[0] = redacted(source["url"])
                with self._open(source["url"], scratch, should_stop) as tar:
                    check_tar(tar, reading[0])
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
            raise EnvironmentFailure(f"{reading[0]}: no readable shard ({reason}); make or copy it again") from error
        for url in urls:
            # Also because a worker whose shards are all empty would look for a clip forever.
            if redacted(url) not in seen:
                raise DataError(f"{redacted(url)}: holds no clip; leave it out")

    @contextlib.contextmanager
    def _open(self, url: str, scratch: Path, should_stop: Callable[[], bool]) -> Iterator[BinaryIO]:
        if not is_remote(url):
            with open(url, "rb") as tar:
                yield tar
            return
        # Whole shards, resumed and retried as any download; what a killed run has left may be of another version.
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
    """Walk the headers and return to the start. Raises EnvironmentFailure at the first damaged one.

    The tar library takes a damaged header for the end of the archive, and would leave out the rest in silence.
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
    tar.seek(0)


def latent_clips(samples: Iterable[TarSample], encoders: Encoders) -> Iterator[ShardClip]:
    """Clips of latent shards; each gets its caption's features. A clip that is missing or damaged ends the run."""
    shard, count, of = "", 0, 0
    prompts: dict[str, tuple[bytes, str]] = {}
    for sample in samples:
        if sample["__url__"] != shard:
            _expect(shard, count, of)
            shard, count, prompts = sample["__url__"], 0, {}
        facts = _facts(sample, encoders)
        _expect(shard, count, facts.pop("position"))
        of, sha256 = facts.pop("of"), facts.pop("sha256")
        clip = ClipEntry(**facts)
        try:
            content = {kind: sample[f"{kind}.safetensors"] for kind in sha256}
        except KeyError as error:
            raise EnvironmentFailure(f"{redacted(shard)}, clip {clip.key}: has no {error.args[0]}; {MEND}") from error
        if PROMPT in content:
            prompts[clip.caption] = content[PROMPT], sha256[PROMPT]
        content[PROMPT], sha256[PROMPT] = prompts[clip.caption]
        count += 1
        yield ShardClip(clip, redacted(shard), content, sha256)
    _expect(shard, count, of)


def _facts(sample: TarSample, encoders: Encoders) -> dict[str, Any]:
    shard = redacted(sample["__url__"])
    data = sample.get("json", b"")
    if not is_sealed(data):
        raise EnvironmentFailure(f"{shard}, clip {sample['__key__']}: its facts are missing or damaged; {MEND}")
    facts = json.loads(data)
    del facts["self_sha256"]
    if facts.pop("version", None) != SHARD_INDEX_VERSION:
        raise DataError(f"{shard}: of another version of sa3dist; encode the audio again")
    difference = encoders.difference(Encoders(**facts.pop("encoders")))
    if difference:
        raise DataError(f"{shard}: encoded with {difference}; give the model it was encoded with, or the audio")
    if not {LATENTS, FLIPPED} <= facts["sha256"].keys():
        raise EnvironmentFailure(f"{shard}, clip {facts['key']}: lacks a polarity; {MEND}")
    return facts


def _expect(shard: str, count: int, of: int) -> None:
    if count != of:
        raise EnvironmentFailure(f"{redacted(shard)}: clip {min(count, of)} is not in its place; {MEND}")


def audio_clips(samples: Iterable[TarSample]) -> Iterator[ShardClip]:
    """Clips of audio shards with their captions. What cannot be used raises DataError, naming shard and clip."""
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
