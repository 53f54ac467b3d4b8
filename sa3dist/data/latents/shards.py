"""Latent shards: WebDataset tars of encoded clips, each with an index of member offsets and digests.

A clip consists of <stem>.json (metadata with its own digest), .txt (caption), .latents.safetensors and
.flipped.safetensors (one per polarity). The first clip of a shard with a given caption also has .prompt.safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sa3dist.data.remote.ranges import RemoteFile
from sa3dist.data.source.index_check import clip_fault, is_digest, is_whole
from sa3dist.data.source.tar_writer import member_stem, new_tar
from sa3dist.errors import DataError, EnvironmentFailure, printable
from sa3dist.formats import ClipEntry, ShardEntry, is_sealed, sealed, write_whole

SHARD_PREFIX = "latents-"
SHARD_INDEX_VERSION = 1
# Kinds of members of a clip: the two polarities, and the caption's features.
LATENTS, FLIPPED, PROMPT = "latents", "flipped", "prompt"
# Ends the messages about damaged shards.
REMEDY = "delete the shard and run sa3dist encode, or copy it again"

Name = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Encoders:
    """What the numbers in a shard depend on besides audio and captions. The encoders are hex digests of weights."""

    version: str
    autoencoder: str
    text_encoder: str
    sample_rate_hz: int
    samples_per_frame: int
    latent_channels: int
    prompt_tokens: int

    def difference(self, other: Encoders) -> str | None:
        """The first difference of ``other`` (a shard's) from this (the base's), for a message; None if equal."""
        # Sizes first: they say more than digests.
        for name in ("latent_channels", "samples_per_frame", "sample_rate_hz", *vars(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} {str(theirs)[:16]}, this base has {str(ours)[:16]}"
        return None


class Place(NamedTuple):
    """Offset and length of one member in its tar, and the hex SHA-256 of its bytes."""

    offset: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class EncodedClip:
    """One clip of a latent shard.

    clip     its ``shard`` and ``audio_offset`` are empty: the audio may no longer exist
    places   of LATENTS and FLIPPED; also of PROMPT if the clip is the shard's first with its caption
    """

    clip: ClipEntry
    places: dict[str, Place]


def member_name(clip: ClipEntry, kind: str) -> Name:
    """The key to look up a member by. Clips with the same audio, or the same caption, share it."""
    return (PROMPT, clip.caption) if kind == PROMPT else (kind, clip.audio_sha256)


@dataclasses.dataclass(frozen=True)
class LatentShard:
    """A finished shard and its index: a file next to it with the same name and suffix .json.

    dataset   digest of the data set it was made from
    number    position among the shards of the data set, from 0
    of        number of shards of the data set
    """

    path: Path | RemoteFile
    entry: ShardEntry
    encoders: Encoders
    dataset: str
    number: int
    of: int
    clips: tuple[EncodedClip, ...]

    def write_index(self) -> None:
        head = {
            "version": SHARD_INDEX_VERSION,
            "encoders": dataclasses.asdict(self.encoders),
            "dataset": self.dataset,
            "number": self.number,
            "of": self.of,
            "shard": dataclasses.asdict(self.entry),
        }
        clips = ",\n".join(
            json.dumps({**vars(encoded.clip), "places": encoded.places}, ensure_ascii=False) for encoded in self.clips
        )
        body = f'{json.dumps(head, ensure_ascii=False)[:-1]}, "clips": [\n{clips}\n]'
        write_whole(index_path(self.path), sealed(body))

    @classmethod
    def read(cls, path: Path | RemoteFile, index: Path | None = None) -> LatentShard:
        """Read the index of the shard at ``path`` and compare the tar's length. Members are verified when read.

        index   path of the index; default: next to the shard
        Raises DataError, naming the file, if either is missing or damaged.
        """
        index = index_path(path) if index is None else index
        try:
            data = index.read_bytes()
            value = json.loads(data)
            if not is_sealed(data) or value["version"] != SHARD_INDEX_VERSION:
                raise DataError(f"{index}: the index is damaged or of another version; {REMEDY}")
            clips = tuple(_clip_of(clip) for clip in value["clips"])
            rest = value["dataset"], value["number"], value["of"], clips
            shard = cls(path, ShardEntry(**value["shard"]), Encoders(**value["encoders"]), *rest)
            size = path.file_bytes if isinstance(path, RemoteFile) else path.stat().st_size
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = printable(str(error))
            raise DataError(f"{index}: no readable index of a latent shard ({reason}); {REMEDY}") from error
        for fault in latent_faults(shard):
            raise DataError(f"{index}: {fault}; {REMEDY}")
        if size != shard.entry.bytes:
            raise DataError(f"{path}: {size} bytes, expected {shard.entry.bytes}; {REMEDY}")
        return shard


def latent_faults(shard: LatentShard) -> Iterator[str]:
    """Like ``index_faults``, for a latent shard's index."""
    if not (isinstance(shard.dataset, str) and is_whole(shard.of, 1) and is_whole(shard.number, 0, shard.of - 1)):
        yield "names no data set, or no place among its shards"
        return
    if not (is_whole(shard.entry.bytes, 1) and _usable(shard.encoders)):
        yield "has no usable length or encoders"
        return
    for encoded in shard.clips:
        if (fault := clip_fault(encoded.clip) or _member_fault(encoded, shard.entry.bytes)) is not None:
            yield f"clip {ascii(encoded.clip.key)[:80]} {fault}"


def _usable(encoders: Encoders) -> bool:
    texts = encoders.version, encoders.autoencoder, encoders.text_encoder
    sizes = encoders.sample_rate_hz, encoders.samples_per_frame, encoders.latent_channels, encoders.prompt_tokens
    return all(isinstance(text, str) and text.isprintable() for text in texts) and all(is_whole(n, 1) for n in sizes)


def _member_fault(encoded: EncodedClip, shard_bytes: int) -> str | None:
    if not {LATENTS, FLIPPED} <= encoded.places.keys() <= {LATENTS, FLIPPED, PROMPT}:
        return "lacks a polarity"
    for place in encoded.places.values():
        if not (is_whole(place.offset, 0) and is_whole(place.bytes, 1) and is_digest(place.sha256)):
            return "has no usable place"
        if place.offset + place.bytes > shard_bytes:
            return "lies outside its shard"
    return None


def _clip_of(value: dict[str, Any]) -> EncodedClip:
    places = {kind: Place(*place) for kind, place in value.pop("places").items()}
    return EncodedClip(ClipEntry(**value), places)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def latent_shard_name(number: int) -> str:
    return f"{SHARD_PREFIX}{number:06d}.tar"


def write_latent_shard(
    path: Path,
    clips: list[ClipEntry],
    encoders: Encoders,
    dataset: str,
    number: int,
    of: int,
    content: Callable[[ClipEntry, str], bytes],
) -> LatentShard:
    """Write a shard, then its index, each atomically: a shard that has an index is complete.

    content   returns the bytes of one kind of member of a clip; called clip by clip, to hold only one in memory
    """
    written: list[EncodedClip] = []
    captions: set[str] = set()
    with new_tar(path) as out:
        for position, clip in enumerate(clips):
            clip = dataclasses.replace(clip, shard="", audio_offset=0)
            kinds = (LATENTS, FLIPPED) if clip.caption in captions else (LATENTS, FLIPPED, PROMPT)
            captions.add(clip.caption)
            data = {kind: content(clip, kind) for kind in kinds}
            digests = {kind: hashlib.sha256(value).hexdigest() for kind, value in data.items()}
            stem = member_stem(clip.key)
            facts = {"version": SHARD_INDEX_VERSION, **vars(clip), "position": position, "of": len(clips)}
            facts |= {"sha256": digests, "encoders": vars(encoders)}
            out.add(f"{stem}.json", sealed(json.dumps(facts)[:-1]))
            out.add(f"{stem}.txt", clip.caption.encode())
            places = {
                kind: Place(out.add(f"{stem}.{kind}.safetensors", value), len(value), digests[kind])
                for kind, value in data.items()
            }
            written.append(EncodedClip(clip, places))
    shard = LatentShard(path, out.entry, encoders, dataset, number, of, tuple(written))
    shard.write_index()
    return shard


def read_member(path: Path | RemoteFile, place: Place, what: str) -> bytes:
    """Read and verify one member. Raises EnvironmentFailure, naming shard and ``what``, if it is damaged."""
    if isinstance(path, RemoteFile):
        data = path.read(*place, what)
        if data is None:
            raise EnvironmentFailure(f"{path}: the {what} do not match their digest; upload shard and index again")
        return data
    try:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(place.offset)
            data = stream.read(place.bytes)
    except OSError as error:
        raise EnvironmentFailure(f"{path}: cannot read the {what} ({error.strerror or error}); {REMEDY}") from error
    if hashlib.sha256(data).hexdigest() != place.sha256:
        raise EnvironmentFailure(f"{path}: the {what} do not match their digest; {REMEDY}")
    return data


class LatentShards:
    """Where each member lies in the shards of a work directory or of a source."""

    def __init__(self, root: Path, encoders: Encoders) -> None:
        """root: folder of folders of shards. Shards of other encoders are ignored."""
        self._root = Path(root)
        self.encoders = encoders
        # Indices that have been read, by path and modification time.
        self._read: set[tuple[Path, int]] = set()
        self._places: dict[Name, tuple[Path | RemoteFile, Place]] = {}
        self._last_scan = -math.inf

    def add(self, shard: LatentShard) -> None:
        for encoded in shard.clips:
            for kind, place in encoded.places.items():
                self._places.setdefault(member_name(encoded.clip, kind), (shard.path, place))

    def find(self, name: Name) -> tuple[Path | RemoteFile, Place] | None:
        return self._places.get(name)

    def search(self, name: Name, after_seconds: float = 0.0) -> tuple[Path | RemoteFile, Place] | None:
        """Like ``find``, but reads new indices first if the last scan was at least ``after_seconds`` ago."""
        if name not in self._places and time.monotonic() - self._last_scan >= after_seconds:
            self._last_scan = time.monotonic()
            for directory in sorted(path for path in self._root.glob("*") if path.is_dir()):
                self.load(directory)
        return self._places.get(name)

    def load(self, directory: Path) -> None:
        """Read the indices in one folder. Damaged ones and those of other encoders are ignored."""
        for path in sorted(directory.glob(f"{SHARD_PREFIX}*.tar")):
            try:
                # With its time: a damaged index may have been rewritten.
                version = path, index_path(path).stat().st_mtime_ns
                if version in self._read:
                    continue
                with contextlib.suppress(DataError):
                    shard = LatentShard.read(path)
                    if shard.encoders == self.encoders:
                        self.add(shard)
            except FileNotFoundError:
                continue
            # Last, so that another thread that sees the index as read also finds its clips.
            self._read.add(version)
