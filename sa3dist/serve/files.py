"""Uploaded files in a store of fsspec: written whole, each with a note of its owner, kind and end."""

import contextlib
import dataclasses
import hashlib
import json
import re
import secrets
import time
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

import fsspec

# Where a file's name may be shown; the store never sees it.
_PLAIN = re.compile(r"[^A-Za-z0-9._ -]+")
ID_DIGITS = 32
# Uploads in parts that were begun and not completed, and files that were half sent, go after a day.
UNFINISHED_SECONDS = 24 * 3600
COPY_BYTES = 1 << 20
# Under which file systems tell when a file was written: local ones, S3, Google's, memory.
TIMES = ("mtime", "LastModified", "updated", "created")
MAX_PARTS = 10_000


def plain_name(name: str) -> str:
    """A client's name of a file as one that is harmless in an address and a header."""
    return _PLAIN.sub("_", name.replace("\\", "/").rpartition("/")[2]).strip("._ -")[-80:].replace(" ", "_") or "file"


def is_id(word: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", word) is not None


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """The note of one file.

    owner     id of the key that sent it            name      as ``plain_name`` gives it
    size      bytes                                 expires   seconds since 1970, None = with its owner's jobs
    sha256    of its bytes
    """

    id: str
    owner: str
    name: str
    content_type: str
    size: int
    created: float
    expires: float | None = None
    sha256: str | None = None


class Sink:
    """A file that is being written, with the size and the digest of what was."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._digest = out, hashlib.sha256()
        self.size = 0

    def write(self, block: bytes) -> None:
        self._out.write(block)
        self._digest.update(block)
        self.size += len(block)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class FileStore:
    """Files by id: 32 hexadecimal digits that nobody can guess and that we choose, so no client names a path."""

    def __init__(self, address: str) -> None:
        """address: of a folder, local or of any file system that fsspec knows."""
        # Another server may have written what this one has not listed.
        self._system, self._root = fsspec.core.url_to_fs(address, use_listings_cache=False)
        self._system.makedirs(self._root, exist_ok=True)

    def new_id(self) -> str:
        return secrets.token_hex(ID_DIGITS // 2)

    def writing(self, file_id: str) -> contextlib.AbstractContextManager[Sink]:
        """Write a file's bytes; nothing is left where the block fails. ``keep`` makes it one."""
        return self._writing(self._data(file_id))

    def keep(self, note: StoredFile, written: Sink) -> StoredFile:
        """The bytes are there: from now on the file is. Returns its note."""
        note = dataclasses.replace(note, size=written.size, sha256=written.sha256)
        # The note last: without one there is no file.
        self._write_json(self._note(note.id), dataclasses.asdict(note))
        return note

    def find(self, file_id: str) -> StoredFile | None:
        """The note of a file; None where there is none, or its time is over."""
        values = self._read_json(self._note(file_id)) if is_id(file_id) else None
        note = None if values is None else StoredFile(**values)
        return None if note is None or (note.expires is not None and note.expires < time.time()) else note

    def open(self, file_id: str) -> BinaryIO:
        return self._system.open(self._data(file_id), "rb")

    def address(self, file_id: str) -> str:
        """What a trainer reads the file from: a path of this machine, or an address of the object store."""
        path = self._data(file_id)
        return path if "file" in self._protocols() else self._system.unstrip_protocol(path)

    def id_of(self, address: str) -> str | None:
        """The id of the file that ``address`` gives this for; None for any other."""
        file_id = address.rpartition("/")[2].removesuffix(".data")
        return file_id if is_id(file_id) and address == self.address(file_id) else None

    def delete(self, file_id: str) -> None:
        for path in (self._note(file_id), self._data(file_id)):
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(path)

    # Uploads in parts.

    # An upload has the id of the file that it becomes: a client that repeats its end finds the file.

    def begin_parts(self, note: StoredFile) -> None:
        """Begin an upload in parts that becomes the file of ``note``."""
        self._system.makedirs(self._parts(note.id), exist_ok=True)
        self._write_json(f"{self._parts(note.id)}/note.json", dataclasses.asdict(note))

    def find_parts(self, upload_id: str) -> StoredFile | None:
        values = self._read_json(f"{self._parts(upload_id)}/note.json") if is_id(upload_id) else None
        return None if values is None else StoredFile(**values)

    def parts_size(self, upload_id: str, without: int) -> int:
        """Bytes of all parts but one."""
        known = ("note.json", f"{without}")
        listed = self._list(self._parts(upload_id))
        return sum(item["size"] for item in listed if item["name"].rpartition("/")[2] not in known)

    def writing_part(self, upload_id: str, number: int) -> contextlib.AbstractContextManager[Sink]:
        return self._writing(f"{self._parts(upload_id)}/{number:d}")

    def complete_parts(self, note: StoredFile, numbers: list[int]) -> StoredFile:
        """Join the parts in this order. Raises FileNotFoundError for one that was not sent."""
        with self.writing(note.id) as out:
            for number in numbers:
                with self._system.open(f"{self._parts(note.id)}/{number:d}", "rb") as part:
                    while block := part.read(COPY_BYTES):
                        out.write(block)
        note = self.keep(note, out)
        self.end_parts(note.id)
        return note

    def end_parts(self, upload_id: str) -> None:
        """Forget an upload in parts."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self._parts(upload_id), recursive=True)

    def sweep(self, in_use: Collection[str | None], keep_seconds: float | None = None) -> None:
        """Remove what was begun and not finished a day ago, and files whose time is over and that no job needs.

        in_use         ids of those that a job needs
        keep_seconds   after which a file's time is over, whatever its note says; None: never
        """
        now = time.time()
        old = now - UNFINISHED_SECONDS
        listed = self._list(self._root)
        names = {item["name"].rpartition("/")[2] for item in listed}
        for item in listed:
            name = item["name"].rpartition("/")[2]
            file_id, _, kind = name.partition(".")
            made = next((item[key] for key in TIMES if item.get(key) is not None), None)
            if made is None:
                # A folder of an object store, which has none itself.
                begun = self.find_parts(file_id)
                made = begun.created if begun else now
            made = made if isinstance(made, int | float) else made.timestamp()
            is_over = keep_seconds is not None and made < now - keep_seconds
            if kind == "parts" and made < old:
                self.end_parts(file_id)
            elif kind == "json" and file_id not in in_use and (is_over or self.find(file_id) is None):
                self.delete(file_id)
            elif made < old and (kind.endswith(".tmp") or (kind == "data" and f"{file_id}.json" not in names)):
                self._system.rm_file(item["name"])

    def _list(self, folder: str) -> list[dict[str, Any]]:
        # An object store has no empty folder.
        with contextlib.suppress(FileNotFoundError):
            return self._system.ls(folder, detail=True, refresh=True)
        return []

    def _protocols(self) -> tuple[str, ...]:
        protocol = self._system.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _data(self, file_id: str) -> str:
        return f"{self._root}/{file_id}.data"

    def _note(self, file_id: str) -> str:
        return f"{self._root}/{file_id}.json"

    def _parts(self, upload_id: str) -> str:
        return f"{self._root}/{upload_id}.parts"

    @contextlib.contextmanager
    def _writing(self, path: str) -> Iterator[Sink]:
        # Under a name of its own: a client that sends the same again must not lose it to its first, broken try.
        temporary = f"{path}.{secrets.token_hex(4)}.tmp"
        try:
            with self._system.open(temporary, "wb") as out:
                yield Sink(out)
            self._system.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(temporary)
            raise

    def _write_json(self, path: str, value: Any) -> None:
        with self._writing(path) as out:
            out.write(json.dumps(value).encode())

    def _read_json(self, path: str) -> Any:
        try:
            with self._system.open(path, "rb") as note:
                return json.loads(note.read())
        except FileNotFoundError:
            return None
