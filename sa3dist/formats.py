"""Files on disk: atomic writes, digests, and the index of a data set's shards."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sa3dist.errors import DataError, counted, listed

# How a run ended. In output_dir, or in the directory a supervisor names if that cannot be written.
STATUS_NAME = "status.json"
STATUS_DIR_VARIABLE = "SA3DIST_STATUS_DIR"
# Beside the last adapter: the adapter with the lowest validation loss, the run's description and the endpoint's answer.
BEST_ADAPTER_NAME = "lora.best.safetensors"
RUN_CONFIG_NAME, RESULT_NAME = "config.json", "result.json"
INDEX_NAME, INDEX_VERSION = "index.json", 2
# Ends the index; the digest of all bytes before it follows.
_SEAL = '"self_sha256": "'
# A temporary file or folder this old was left by a killed run.
STALE_SECONDS = 24 * 3600
# Other processes cannot interfere this many times in a row.
FOLDER_ATTEMPTS = 1000
# Names of left-out files that an index lists per kind; the rest is only counted.
NAMES_KEPT = 1000


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success fsync the file and rename it over ``target``.

    If the block raises, the temporary file is removed. A reader sees either the old file or the whole new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, target)
        fsync(target.parent)
    except OSError as failure:
        failure.filename = failure.filename or os.fspath(target)  # write() does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: Path, unless: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; on success rename it to ``target``, replacing what was there.

    unless  called before the rename; true when another process has made a good ``target`` meanwhile, which is then kept
    Files written into the folder must be synced already (``atomic_path`` does that). If the block raises, the folder is
    removed. Also removed: folders left by killed runs more than a day ago, and the parent if it is empty.
    """
    temporary = _empty_folder_beside(target)
    remove_stale(path for path in target.parent.glob(".*.tmp") if path.is_dir())
    try:
        yield temporary
        fsync(temporary)
        try:
            if not unless():
                _replace_directory(temporary, target)
        except OSError:
            # Another process may have made it just now.
            if not unless():
                raise
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            # Fails unless the parent is empty.
            target.parent.rmdir()


def remove_stale(leftovers: Iterable[Path]) -> None:
    """Remove those of the files and folders that are more than a day old: killed runs have left them."""
    for leftover in leftovers:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def _beside(target: Path) -> Path:
    # Not tempfile, whose files are private: the umask decides who may read artefacts.
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _empty_folder_beside(target: Path) -> Path:
    left = FOLDER_ATTEMPTS
    while True:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = _beside(target)
            temporary.mkdir()
            return temporary
        except (FileNotFoundError, FileExistsError):
            # Another process may remove the empty parent at any moment; a file in its place or a dangling link stays.
            left -= 1
            # Ask once only: the parent could vanish between two questions.
            if not left or target.parent.is_file():
                raise


def _replace_directory(new: Path, target: Path) -> None:
    # A folder with files cannot be renamed over: move the old one away first. Readers miss it for microseconds.
    trash = _beside(target)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, trash)
        os.rename(new, target)
    finally:
        shutil.rmtree(trash, ignore_errors=True)


def fsync(path: Path) -> None:
    """Make written data of a file, or renames inside a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content, never a part. Text is written as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def digest_of(*parts: str | bytes) -> str:
    """SHA-256 over length-prefixed parts, as hex: different lists of parts never hash the same bytes."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex; reads in blocks."""
    state = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


@dataclasses.dataclass(frozen=True)
class ClipEntry:
    """One captioned clip inside a shard.

    key             path of the clip inside the source, without extension; unique; users see it in messages
    shard           file name of the tar that holds it
    audio_offset    byte offset of the audio bytes inside the tar
    audio_bytes     length of the audio in bytes, unchanged from the source
    audio_sha256    hex digest of those bytes
    extension       lower case, without the dot
    samples         length per channel, at its own sample_rate_hz
    caption         stripped, never empty
    """

    key: str
    shard: str
    audio_offset: int
    audio_bytes: int
    audio_sha256: str
    extension: str
    samples: int
    sample_rate_hz: int
    channels: int
    caption: str

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate_hz


def dataset_digest(clips: Iterable[ClipEntry]) -> str:
    """Digest of a data set: keys, extensions, audio and captions of its clips, in order."""
    return digest_of(*(part for clip in clips for part in (clip.key, clip.extension, clip.audio_sha256, clip.caption)))


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One finished tar: file name, length in bytes, hex SHA-256 of the whole file."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Files of one kind that are not trained on, and why.

    what    the kind in the singular        count   how many
    names   some of them: all in a listing, NAMES_KEPT in an index, none for system files
    """

    what: str
    why: str
    count: int
    names: tuple[str, ...] = ()

    def line(self, most: int = 3) -> str:
        """One line for people, with the first ``most`` names."""
        names = listed(self.names, self.count, most)
        return f"{counted(self.count, self.what)}{f' ({names})' if names else ''}: {self.why}"

    def kept(self) -> LeftOut:
        """With as many names as an index keeps."""
        return dataclasses.replace(self, names=self.names[:NAMES_KEPT])


@dataclasses.dataclass(frozen=True)
class DatasetIndex:
    """The shards of one dataset.

    directory  of the shards and this index
    digest     of keys, audio bytes and captions, whatever archive they came in
    clips      sorted by key
    skipped    "name: reason" of each clip that ``on_bad_clip: skip`` left out
    left_out   files of the source that are not clips, by kind
    reader     returns a clip's verified audio if the shards are stored elsewhere; neither stored nor compared.
               Raises DataError, EnvironmentFailure or Interrupted
    """

    directory: Path
    digest: str
    clips: tuple[ClipEntry, ...]
    skipped: tuple[str, ...] = ()
    shards: tuple[ShardEntry, ...] = ()
    reader: Callable[[ClipEntry], bytes] | None = dataclasses.field(default=None, compare=False)
    left_out: tuple[LeftOut, ...] = ()

    def write(self) -> None:
        """One clip per line: people can search the file, and programs read 100,000 clips in a second."""
        clips = ",\n".join(json.dumps(vars(clip), ensure_ascii=False) for clip in self.clips)
        rest = {"skipped": self.skipped, "shards": [vars(shard) for shard in self.shards]}
        if self.left_out:
            rest["left_out"] = [vars(kind) for kind in self.left_out]
        body = (
            f'{{"version": {INDEX_VERSION}, "digest": {json.dumps(self.digest)}, "clips": [\n{clips}\n],\n'
            f"{json.dumps(rest, ensure_ascii=False)[1:-1]}"
        )
        write_whole(self.directory / INDEX_NAME, sealed(body))

    @classmethod
    def find(cls, directory: Path) -> DatasetIndex | None:
        """As ``read``, but None if the index cannot be read."""
        with contextlib.suppress(DataError):
            return cls.read(directory)
        return None

    @classmethod
    def read(cls, directory: Path) -> DatasetIndex:
        """Raises DataError, naming the file, when the index is missing, damaged or of another version."""
        path = Path(directory) / INDEX_NAME
        try:
            data = path.read_bytes()
            value = json.loads(data)
            if (version := value["version"]) != INDEX_VERSION:
                raise DataError(f"{path}: index version {version!a:.20}, expected {INDEX_VERSION}; run sa3dist shard")
            if not is_sealed(data):
                raise DataError(f"{path}: damaged, its digest does not match; delete it and run sa3dist shard")
            clips = tuple(ClipEntry(**clip) for clip in value["clips"])
            shards = tuple(ShardEntry(**shard) for shard in value["shards"])
            left_out = tuple(LeftOut(**kind | {"names": tuple(kind["names"])}) for kind in value.get("left_out", ()))
            return cls(Path(directory), value["digest"], clips, tuple(value["skipped"]), shards, left_out=left_out)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # Untrusted text: escape it, so that the message stays one line.
            reason = ascii(str(error))[1:-1]
            raise DataError(f"{path}: not a readable shard index ({reason}); run sa3dist shard") from error


def sealed(body: str) -> bytes:
    """Append to a JSON object, given without its closing brace, the digest of all its bytes as the last value."""
    body += f",\n{_SEAL}"
    return f'{body}{digest_of(body)}"}}\n'.encode()


def is_sealed(data: bytes) -> bool:
    """Whether ``data`` equals, byte for byte, what ``sealed`` returned."""
    # Compare bytes: text mode would accept other line ends.
    body = data[: data.rfind(_SEAL.encode()) + len(_SEAL)]
    return data == body + digest_of(body).encode() + b'"}\n'
