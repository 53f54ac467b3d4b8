"""Latent shards: WebDataset tars of encoded clips, each with an index of offsets and digests.

A clip is <stem>.json (its facts, sealed), .txt (caption), .latents.safetensors and .flipped.safetensors (one per
polarity); the first clip of a shard with a caption also has its .prompt.safetensors.
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
# Kinds of members: the two polarities, and the caption's features.
LATENTS, FLIPPED, PROMPT = "latents", "flipped", "prompt"
# Advice for bytes that do not match their digest.
MEND = "delete the shard and run sa3dist encode, or copy it again"

Name = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Encoders:
    """Everything that decides the numbers in a shard, besides audio and caption; digests of the weights in hex."""

    version: str
    autoencoder: str
    text_encoder: str
    sample_rate_hz: int
    samples_per_frame: int
    latent_channels: int
    prompt_tokens: int

    def difference(self, other: Encoders) -> str | None:
        """The first value in which ``other`` (a shard's) differs from this one (the base's), in words."""
        # Sizes first: they say more than digests.
        for name in ("latent_channels", "samples_per_frame", "sample_rate_hz", *vars(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} {str(theirs)[:16]}, this base has {str(ours)[:16]}"
        return None


class Place(NamedTuple):
    """Position of one member, and the hex SHA-256 of its bytes."""

    offset: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class EncodedClip:
    """One clip of a shard. ``places`` has LATENTS and FLIPPED, and PROMPT if the clip is the first with its caption.

    clip   its ``shard`` and ``audio_offset`` are empty: the audio may be gone
    """

    clip: ClipEntry
    places: dict[str, Place]


def member_name(clip: ClipEntry, kind: str) -> Name:
    """The key of a member: clips with the same audio, or the same caption, share it."""
    return (PROMPT, clip.caption) if kind == PROMPT else (kind, clip.audio_sha256)


@dataclasses.dataclass(frozen=True)
class LatentShard:
    """One finished shard and its index, a file beside it with the same name and the extension .json.

    number, of   the shard's number among those of the data set, counted from 0, and how many there are
    dataset      digest of the data set it was made from
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
            json.dumps({**vars(found.clip), "places": found.places}, ensure_ascii=False) for found in self.clips
        )
        body = f'{json.dumps(head, ensure_ascii=False)[:-1]}, "clips": [\n{clips}\n]'
        write_whole(index_path(self.path), sealed(body))

    @classmethod
    def read(cls, path: Path | RemoteFile, index: Path | None = None) -> LatentShard:
        """The shard at ``path``. Reads only the index and compares the tar's length; members are verified when read.

        index   path of its index; default: beside it
        Raises DataError, naming the file, when either is missing or damaged.
        """
        index = index_path(path) if index is None else index
        try:
            data = index.read_bytes()
            value = json.loads(data)
            if not is_sealed(data) or value["version"] != SHARD_INDEX_VERSION:
                raise DataError(f"{index}: the index is damaged or of another version; {MEND}")
            clips = tuple(_clip_of(clip) for clip in value["clips"])
            rest = value["dataset"], value["number"], value["of"], clips
            shard = cls(path, ShardEntry(**value["shard"]), Encoders(**value["encoders"]), *rest)
            size = path.file_bytes if isinstance(path, RemoteFile) else path.stat().st_size
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = printable(str(error))
            raise DataError(f"{index}: no readable index of a latent shard ({reason}); {MEND}") from error
        for fault in latent_faults(shard):
            raise DataError(f"{index}: {fault}; {MEND}")
        if size != shard.entry.bytes:
            raise DataError(f"{path}: {size} bytes, expected {shard.entry.bytes}; {MEND}")
        return shard


def latent_faults(shard: LatentShard) -> Iterator[str]:
    """``index_faults`` for a latent shard's index."""
    if not (isinstance(shard.dataset, str) and is_whole(shard.of, 1) and is_whole(shard.number, 0, shard.of - 1)):
        yield "names no data set, or no place among its shards"
        return
    if not (is_whole(shard.entry.bytes, 1) and _sound(shard.encoders)):
        yield "has no usable length or encoders"
        return
    for found in shard.clips:
        if (problem := clip_fault(found.clip) or _member_fault(found, shard.entry.bytes)) is not None:
            yield f"clip {ascii(found.clip.key)[:80]} {problem}"


def _sound(encoders: Encoders) -> bool:
    texts = encoders.version, encoders.autoencoder, encoders.text_encoder
    sizes = encoders.sample_rate_hz, encoders.samples_per_frame, encoders.latent_channels, encoders.prompt_tokens
    return all(isinstance(text, str) and text.isprintable() for text in texts) and all(is_whole(n, 1) for n in sizes)


def _member_fault(found: EncodedClip, shard_bytes: int) -> str | None:
    if not {LATENTS, FLIPPED} <= found.places.keys() <= {LATENTS, FLIPPED, PROMPT}:
        return "has not both polarities"
    for place in found.places.values():
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
    """Write a shard, then its index, each atomically: a shard with an index is a finished one.

    content   returns the bytes of one kind of member of a clip; called in order, with one clip in memory at a time
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
    """The bytes of one member. Raises EnvironmentFailure, naming shard and ``what``, when they are not as written."""
    if isinstance(path, RemoteFile):
        data = path.read(*place, what)
        if data is None:
            raise EnvironmentFailure(f"{path}: the {what} do not match their digest; copy shard and index there again")
        return data
    try:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(place.offset)
            data = stream.read(place.bytes)
    except OSError as error:
        raise EnvironmentFailure(f"{path}: cannot read the {what} ({error.strerror or error}); {MEND}") from error
    if hashlib.sha256(data).hexdigest() != place.sha256:
        raise EnvironmentFailure(f"{path}: the {what} do not match their digest; {MEND}")
    return data


class LatentShards:
    """The members of all shards in a work directory, or of a source, by name."""

    def __init__(self, root: Path, encoders: Encoders) -> None:
        """root: a folder of folders of shards; shards of other encoders are ignored."""
        self._root = Path(root)
        self.encoders = encoders
        self._read: set[tuple[Path, int]] = set()
        self._places: dict[Name, tuple[Path | RemoteFile, Place]] = {}
        self._looked = -math.inf

    def add(self, shard: LatentShard) -> None:
        for found in shard.clips:
            for kind, place in found.places.items():
                self._places.setdefault(member_name(found.clip, kind), (shard.path, place))

    def find(self, name: Name) -> tuple[Path | RemoteFile, Place] | None:
        return self._places.get(name)

    def search(self, name: Name, after_seconds: float = 0.0) -> tuple[Path | RemoteFile, Place] | None:
        """As ``find``, but first reads new indices, unless it did so less than ``after_seconds`` ago."""
        if name not in self._places and time.monotonic() - self._looked >= after_seconds:
            self._looked = time.monotonic()
            for directory in sorted(path for path in self._root.glob("*") if path.is_dir()):
                self.load(directory)
        return self._places.get(name)

    def load(self, directory: Path) -> None:
        """Read the indices in one folder. Damaged or foreign ones are ignored; their clips are encoded again."""
        for path in sorted(directory.glob(f"{SHARD_PREFIX}*.tar")):
            try:
                # A damaged index may have been rewritten since.
                version = path, index_path(path).stat().st_mtime_ns
                if version in self._read:
                    continue
                with contextlib.suppress(DataError):
                    shard = LatentShard.read(path)
                    if shard.encoders == self.encoders:
                        self.add(shard)
            except FileNotFoundError:
                continue
            # Last, so that another thread that sees it here also finds its clips.
            self._read.add(version)
