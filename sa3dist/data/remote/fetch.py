"""Download remote sources (any fsspec URL) to the work directory, each version of a file once."""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from sa3dist.data.remote.download import CONNECT_SECONDS, SILENT_SECONDS, download, query, remote_info, version_of
from sa3dist.data.remote.public_addresses import is_public_only, public_socket
from sa3dist.errors import DataError, EnvironmentFailure, Interrupted, first_line
from sa3dist.formats import digest_of, file_sha256, fsync, write_json
from sa3dist.runtime.file_lock import alone

# An hour of 24-bit stereo at 48 kHz is 1.04e9 bytes; the longest clip a model uses is 380 s.
MAX_MEMBER_BYTES = 1 << 30
# Five times the size of 2000 clips of 380 s in 24-bit stereo at 48 kHz.
MAX_TOTAL_BYTES = 1 << 40
_EXTRAS = {"s3": "pip install 'sa3dist[s3]'", "http": "pip install aiohttp", "https": "pip install aiohttp"}


def is_remote(source: str) -> bool:
    return "://" in source and source[:7].lower() != "file://"


def split_query(source: str) -> tuple[str, str]:
    """An address without its query, and the query from ``?`` on (in http also from ``#``, elsewhere part of a name)."""
    if not is_remote(source):
        return source, ""
    address = re.split(r"[?#]" if source[:4].lower() == "http" else r"\?", source, maxsplit=1)[0]
    return address, source[len(address) :]


def address_name(source: str) -> str:
    """The last part of an address's path, not decoded."""
    return split_query(source)[0].partition("://")[2].partition("/")[2].rpartition("/")[2]


def redacted(source: str) -> str:
    """``source`` without user, password and query, which may be secret."""
    if not is_remote(source):
        return source
    scheme, _, rest = split_query(source)[0].partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def fetch(source: str, downloads: Path, should_stop: Callable[[], bool], max_bytes: int = MAX_TOTAL_BYTES) -> Path:
    """Download one URL; returns the local file or folder. See ``Downloads``."""
    return Downloads(downloads, should_stop, max_bytes).fetch(source)


class Downloads(contextlib.AbstractContextManager):
    """A folder of downloaded files, named <sha256>-<name>, each with a .json of its URL and version.

    A file whose version (ETag, time, size) is already present is not downloaded again. An incomplete download of a
    known version is continued by the next run.
    """

    def __init__(self, directory: Path, should_stop: Callable[[], bool], max_bytes: int = MAX_TOTAL_BYTES) -> None:
        """max_bytes: limit of all files fetched through this object, already present or not."""
        self._directory = directory
        self._should_stop = should_stop
        self._left = max_bytes
        self.fetched: list[Path] = []

    def fetch(self, source: str) -> Path:
        """Download ``source``; returns the local file or folder.

        Raises DataError if it does not exist, may not be read or is too large; EnvironmentFailure if it keeps failing.
        """
        with self._alone(source):
            return self._fetch(source)

    @contextlib.contextmanager
    def borrowed(self, source: str) -> Iterator[Path]:
        """``fetch`` for the duration of a block, then remove the file. Locks the URL against other runs meanwhile."""
        with self._alone(source):
            local = self._fetch(source)
            yield local
            self.release(local)

    @contextlib.contextmanager
    def _alone(self, source: str) -> Iterator[None]:
        """Lock ``source`` against other runs, which would write to the same file."""

        def check_stop() -> None:
            if self._should_stop():
                raise Interrupted(f"{redacted(source)}: stopped while another run downloads it; run again")

        try:
            with alone(self._directory / f".{digest_of(source)[:16]}.lock", check_stop):
                yield
        finally:
            with contextlib.suppress(OSError):
                # Succeeds only if it is empty.
                self._directory.rmdir()

    def _fetch(self, source: str) -> Path:
        label = redacted(source)
        system, path, info = look_up(source, self._should_stop)
        local = (
            self._folder(system, path, source)
            if info.get("type") == "directory"
            else self._file(system, path, source, info, label)
        )
        self.fetched.append(local)
        return local

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """If the block refused the source with DataError, remove everything fetched."""
        if kind is not None and issubclass(kind, DataError):
            for path in self.fetched:
                self.release(path)

    def release(self, path: Path) -> None:
        """Remove a file or folder that ``fetch`` returned."""
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for note in self._directory.glob(f"{path.name}.*.json"):
            note.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Succeeds only if it is empty.
            self._directory.rmdir()

    def _file(self, system: AbstractFileSystem, path: str, source: str, info: dict[str, Any], label: str) -> Path:
        version = version_of(info)
        key = digest_of(source, json.dumps(version, sort_keys=True))[:16]
        local = self._cached(key) if version else None
        if local is None:
            name = re.sub(r"[^A-Za-z0-9._-]", "_", address_name(source))[-80:] or "data"
            local = self._download(system, path, info, key, name, label)
            if version:
                note = {"url": label, "version": version, "sha256": local.name[:64], "bytes": local.stat().st_size}
                write_json(self._directory / f"{local.name}.{key}.json", note)
        self._left -= local.stat().st_size
        if self._left < 0:
            self.fetched.append(local)
            raise DataError(f"{label}: more bytes than max_download_bytes allows for the whole source; split it")
        return local

    def _cached(self, key: str) -> Path | None:
        for note in self._directory.glob(f"*.{key}.json"):
            path = note.with_name(note.name[: -len(f".{key}.json")])
            with contextlib.suppress(OSError, ValueError, KeyError):
                if path.stat().st_size == json.loads(note.read_text(encoding="utf-8"))["bytes"]:
                    return path
        return None

    def _download(
        self, system: AbstractFileSystem, path: str, info: dict[str, Any], key: str, name: str, label: str
    ) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        versioned = bool(version_of(info))
        # Without a version the next run cannot continue this download, so its name is random.
        part = self._directory / (f".{key}.part" if versioned else f".{key}.{secrets.token_hex(4)}.part")
        try:
            download(system, path, info, part, label, max(self._left, 0), self._should_stop)
            fsync(part)
            target = self._directory / f"{file_sha256(part)}-{name}"
            os.replace(part, target)
            fsync(self._directory)
            return target
        except BaseException as failure:
            if not versioned or isinstance(failure, DataError):
                part.unlink(missing_ok=True)
            raise

    def _folder(self, system: AbstractFileSystem, path: str, source: str) -> Path:
        """Download all files below ``path``. Keeps unchanged ones, removes those that no longer exist."""
        listing = query(lambda: system.find(path, detail=True), redacted(source), self._should_stop)
        target = self._directory / f"{digest_of(source)[:16]}-folder"
        notes = self._directory / f"{target.name}.versions.json"
        earlier: dict[str, dict[str, str]] = {}
        with contextlib.suppress(OSError, ValueError):
            earlier = json.loads(notes.read_text(encoding="utf-8"))
        versions: dict[str, dict[str, str]] = {}
        self.fetched.append(target)
        try:
            for name, info in sorted(listing.items()):
                relative = name[len(path.rstrip("/")) + 1 :]
                label = f"{redacted(source)}, {relative}"
                if relative.startswith("/") or ".." in relative.split("/"):
                    raise DataError(f"{label}: points outside the folder; rename it")
                local, version = target / relative, version_of(info)
                complete = local.is_file() and local.stat().st_size == info.get("size")
                if not (version and complete and earlier.get(relative) == version):
                    local.parent.mkdir(parents=True, exist_ok=True)
                    part = local.with_name(f".{local.name}.part")
                    part.unlink(missing_ok=True)
                    download(system, name, info, part, label, min(self._left, MAX_MEMBER_BYTES), self._should_stop)
                    os.replace(part, local)
                self._left -= local.stat().st_size
                versions[relative] = version
            for local in [path for path in target.rglob("*") if path.is_file()]:
                if local.relative_to(target).as_posix() not in versions:
                    local.unlink()
        finally:
            if target.exists():
                write_json(notes, versions)
        return target


def look_up(source: str, should_stop: Callable[[], bool]) -> tuple[AbstractFileSystem, str, dict[str, Any]]:
    """Like ``filesystem``, plus fsspec's info of the file. Raises like ``download``."""
    system, path = filesystem(source)
    try:
        return system, path, remote_info(system, path, redacted(source), should_stop)
    except DataError as error:
        if "#" not in split_query(source)[1].partition("?")[0]:
            raise
        raise DataError(f"{error}; what follows # is not sent, write %23 where it is part of the name") from error


def filesystem(source: str) -> tuple[AbstractFileSystem, str]:
    """fsspec's file system of a URL, and the path in it. Not valid in a forked process.

    Raises DataError if its package is missing, the scheme is unknown, or the address or proxy is invalid;
    EnvironmentFailure if it cannot connect (FTP connects here).
    """
    scheme = source.split("://", 1)[0].lower()
    try:
        return _web(source, scheme) if scheme in ("http", "https") else fsspec.core.url_to_fs(source)
    except ImportError as error:
        hint = _EXTRAS.get(scheme, "install the package it names")
        raise DataError(f"{redacted(source)}: {scheme}:// needs an optional package ({error}); {hint}") from error
    except OSError as error:
        raise EnvironmentFailure(
            f"{redacted(source)}: cannot be reached ({first_line(error)}); check the address, or run again to continue"
        ) from error
    # TypeError and AttributeError if the address lacks a part that its file system requires.
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{redacted(source)}: {scheme}:// is no known kind of location; use a path, http(s):// or s3://"
        ) from error


def _web(source: str, scheme: str) -> tuple[AbstractFileSystem, str]:
    import aiohttp

    from sa3dist.data.remote.http_request import BoundedResponse, Request, as_sent, proxy_for

    try:
        address = as_sent(source)
    except ValueError as error:
        raise DataError(f"{redacted(source)}: no valid address ({error}); check it") from error
    # Raise for a wrong proxy here, rather than as the cause of a failed request.
    proxy_for(address)
    # By default aiohttp ends every request after five minutes.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
    session = {"timeout": timeout, "response_class": BoundedResponse, "request_class": Request}
    # Not url_to_fs, which takes "::" in an address for a chain of file systems.
    public = {"get_client": _public_client} if is_public_only() else {}
    system = fsspec.filesystem(scheme, client_kwargs={**session, "requote_redirect_url": False}, encoded=True, **public)
    return system, str(address)


async def _public_client(**options: Any) -> Any:
    """A session that connects to public addresses only, also after redirects."""
    import aiohttp

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=public_socket), **options)
