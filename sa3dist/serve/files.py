"""Uploaded files in an fsspec file system: written atomically, each with a note of owner, type and expiry."""

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
from fsspec.implementations.local import LocalFileSystem

# Characters to replace in names in addresses and headers. Stored files are named by id.
_PLAIN = re.compile(r"[^A-Za-z0-9._ -]+")
# Incomplete uploads are removed after a day.
UNFINISHED_SECONDS = 24 * 3600
COPY_BYTES = 1 << 20
# Keys of the modification time in various file systems: local, S3, Google Cloud, memory.
TIMES = ("mtime", "LastModified", "updated", "created")
MAX_PARTS = 10_000


def plain_name(name: str) -> str:
    """A client's file name, made safe for addresses and headers."""
    return _PLAIN.sub("_", name.replace("\\", "/").rpartition("/")[2]).strip("._ -")[-80:].replace(" ", "_") or "file"


def is_id(word: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", word) is not None


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """The note of one file.

    owner     id of the key that uploaded it
    name      from ``plain_name``
    size      in bytes
    expires   seconds since 1970; None: when no job of its owner needs it
    sha256    of its bytes; None while the upload is incomplete
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
    """A file being written, with size and digest of what has been written."""

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
    """Files by id: 32 random hexadecimal digits, so that clients can neither guess ids nor choose paths."""

    def __init__(self, address: str) -> None:
        """address: path or fsspec URL of a folder."""
        # No listings cache: other servers may write to the folder.
        self._system, self._root = fsspec.core.url_to_fs(address, use_listings_cache=False)
        self._system.makedirs(self._root, exist_ok=True)

    def new(self, owner: str, name: str, content_type: str, keep_seconds: float | None = None) -> StoredFile:
        """The note of a file about to be stored. keep_seconds: until it expires."""
        kind = content_type[:100] if content_type.isprintable() else "application/octet-stream"
        now = time.time()
        expires = None if keep_seconds is None else now + keep_seconds
        return StoredFile(secrets.token_hex(16), owner, plain_name(name), kind, 0, now, expires)

    def writing(self, file_id: str) -> contextlib.AbstractContextManager[Sink]:
        """Write a file's bytes; they are removed if the block fails. Then call ``keep``."""
        return self._writing(self._data(file_id))

    def keep(self, note: StoredFile, written: Sink) -> StoredFile:
        """Complete a file whose bytes are written. Returns its final note."""
        note = dataclasses.replace(note, size=written.size, sha256=written.sha256)
        # Written last: a file without a note does not exist.
        self._write_json(self._note(note.id), dataclasses.asdict(note))
        return note

    def store(self, note: StoredFile, content: bytes) -> StoredFile:
        """Store a whole file. Returns its final note."""
        with self.writing(note.id) as out:
            out.write(content)
        return self.keep(note, out)

    def find(self, file_id: str) -> StoredFile | None:
        """The note of a file; None if it does not exist or has expired."""
        values = self._read_json(self._note(file_id)) if is_id(file_id) else None
        note = None if values is None else StoredFile(**values)
        return None if note is None or (note.expires is not None and note.expires < time.time()) else note

    def open(self, file_id: str) -> BinaryIO:
        return self._system.open(self._data(file_id), "rb")

    def address(self, file_id: str) -> str:
        """Where a trainer reads the file: a local path, or an address in the object store."""
        path = self._data(file_id)
        return path if isinstance(self._system, LocalFileSystem) else self._system.unstrip_protocol(path)

    def id_of(self, address: str) -> str | None:
        """The id of the file with this ``address``; None for other addresses."""
        file_id = address.rpartition("/")[2].removesuffix(".data")
        return file_id if is_id(file_id) and address == self.address(file_id) else None

    def delete(self, *file_ids: str) -> None:
        for path in (path for file_id in file_ids for path in (self._note(file_id), self._data(file_id))):
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(path)

    # Uploads in parts. An upload has the id of its file, so that a repeated request to complete it finds the file.

    def begin_parts(self, note: StoredFile) -> None:
        """Begin an upload in parts of the file of ``note``."""
        self._system.makedirs(self._parts(note.id), exist_ok=True)
        self._write_json(f"{self._parts(note.id)}/note.json", dataclasses.asdict(note))

    def find_parts(self, upload_id: str) -> StoredFile | None:
        values = self._read_json(f"{self._parts(upload_id)}/note.json") if is_id(upload_id) else None
        return None if values is None else StoredFile(**values)

    def parts_size(self, upload_id: str, without: int | None = None) -> int:
        """Total bytes of all parts, or of all except one."""
        excluded = ("note.json", f"{without}")
        listed = self._list(self._parts(upload_id))
        return sum(item["size"] for item in listed if item["name"].rpartition("/")[2] not in excluded)

    def writing_part(self, upload_id: str, number: int) -> contextlib.AbstractContextManager[Sink]:
        return self._writing(f"{self._parts(upload_id)}/{number:d}")

    def complete_parts(self, note: StoredFile, numbers: list[int]) -> StoredFile:
        """Join the parts in this order. Raises FileNotFoundError if one is missing."""
        with self.writing(note.id) as out:
            for number in numbers:
                with self._system.open(f"{self._parts(note.id)}/{number:d}", "rb") as part:
                    while block := part.read(COPY_BYTES):
                        out.write(block)
        note = self.keep(note, out)
        self.end_parts(note.id)
        return note

    def end_parts(self, upload_id: str) -> None:
        """Remove an upload in parts."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self._parts(upload_id), recursive=True)

    def sweep(self, in_use: Collection[str | None], keep_seconds: float | None = None) -> None:
        """Remove uploads that are incomplete after a day, and expired files that no job needs.

        in_use         ids of files that a job needs
        keep_seconds   age at which all files expire, whatever their notes say; None: never
        """
        now = time.time()
        old = now - UNFINISHED_SECONDS
        listed = self._list(self._root)
        names = {item["name"].rpartition("/")[2] for item in listed}
        for item in listed:
            name = item["name"].rpartition("/")[2]
            file_id, _, kind = name.partition(".")
            created = next((item[key] for key in TIMES if item.get(key) is not None), None)
            if created is None:
                # Folders of an object store have no time.
                upload = self.find_parts(file_id)
                created = upload.created if upload else now
            created = created if isinstance(created, int | float) else created.timestamp()
            is_expired = keep_seconds is not None and created < now - keep_seconds
            if kind == "parts" and created < old:
                self.end_parts(file_id)
            elif kind == "json" and file_id not in in_use and (is_expired or self.find(file_id) is None):
                self.delete(file_id)
            elif created < old and (kind.endswith(".tmp") or (kind == "data" and f"{file_id}.json" not in names)):
                self._system.rm_file(item["name"])

    def _list(self, folder: str) -> list[dict[str, Any]]:
        # Object stores have no empty folders.
        with contextlib.suppress(FileNotFoundError):
            return self._system.ls(folder, detail=True, refresh=True)
        return []

    def _data(self, file_id: str) -> str:
        return f"{self._root}/{file_id}.data"

    def _note(self, file_id: str) -> str:
        return f"{self._root}/{file_id}.json"

    def _parts(self, upload_id: str) -> str:
        return f"{self._root}/{upload_id}.parts"

    @contextlib.contextmanager
    def _writing(self, path: str) -> Iterator[Sink]:
        # A unique name, so that a repeated upload is not affected by its first, failed attempt.
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
