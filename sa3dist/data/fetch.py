"""Bring a remote source (any fsspec URL) into the work directory: bounded, streaming, whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from sa3dist.data.containers import MAX_MEMBER_BYTES, MAX_TOTAL_BYTES, printable
from sa3dist.errors import DataError, EnvironmentFailure, Interrupted, SA3DistError
from sa3dist.formats import atomic_path, digest_of

_BLOCK_BYTES = 4 << 20
_EXTRAS = {"s3": "pip install 'sa3dist[s3]'", "http": "pip install aiohttp", "https": "pip install aiohttp"}
# Whatever of these a server tells identifies the version of a file; with none of them it is fetched anew.
_VERSION_KEYS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "md5Hash", "generation")


def is_remote(source: str) -> bool:
    return "://" in source and not source.startswith("file://")


def shown(source: str) -> str:
    """``source`` without user, password and query, which may hold secrets."""
    if not is_remote(source):
        return source
    parts = urlsplit(source)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch(source: str, downloads: Path, should_stop: Callable[[], bool]) -> Path:
    """Download ``source`` below ``downloads`` and return the local file, or folder when the URL is one.

    A file whose version (ETag, time and size) is there already is not fetched again.
    Raises DataError when it does not exist, may not be read or is too large, EnvironmentFailure when it breaks off.
    """
    try:
        system, path = _filesystem(source)
        info = system.info(path)
        if info.get("type") == "directory":
            return _fetch_folder(system, path, source, downloads, should_stop)
        version = {key: str(info[key]) for key in _VERSION_KEYS if info.get(key)}
        name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(urlsplit(source).path).name)[-80:] or "data"
        target = downloads / f"{digest_of(source, repr(sorted(version.items())))[:16]}-{name}"
        if version and target.is_file() and target.stat().st_size == info.get("size"):
            return target
        _copy(system, path, info.get("size"), target, shown(source), MAX_TOTAL_BYTES, should_stop)
        return target
    except SA3DistError:
        raise
    except Exception as error:
        # Every fsspec backend brings its own errors, and its http calls all of them "not found": the cause tells.
        cause = error.__cause__ or error
        status = getattr(cause, "status", None)
        if isinstance(cause, FileNotFoundError) or status in (404, 410):
            raise DataError(f"{shown(source)}: not found; check the address") from error
        if isinstance(cause, PermissionError) or status in (401, 403):
            raise DataError(f"{shown(source)}: access denied; check the address and the credentials") from error
        reason = f"status {status}" if status else printable(str(cause) or type(cause).__name__)[:200]
        raise EnvironmentFailure(f"{shown(source)}: download failed ({reason}); run again") from error


def _filesystem(source: str):
    import fsspec

    scheme = source.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(source)
    except ImportError as error:
        hint = _EXTRAS.get(scheme, "install the package it names")
        raise DataError(f"{shown(source)}: {scheme}:// needs an optional package ({error}); {hint}") from error
    except ValueError as error:
        raise DataError(
            f"{shown(source)}: {scheme}:// is no known kind of location; use a path, http(s):// or s3://"
        ) from error


def _fetch_folder(system, path: str, source: str, downloads: Path, should_stop: Callable[[], bool]) -> Path:
    found = sorted((name, info) for name, info in system.find(path, detail=True).items())
    total = sum(info.get("size") or 0 for _, info in found)
    if total > MAX_TOTAL_BYTES:
        raise DataError(f"{shown(source)}: holds {total} bytes, expected at most {MAX_TOTAL_BYTES}; split it")
    # Folders have no version to compare: they are fetched anew.
    target = downloads / f"{digest_of(source)[:16]}-folder"
    shutil.rmtree(target, ignore_errors=True)
    try:
        for name, info in found:
            relative = name[len(path.rstrip("/")) + 1 :]
            if relative.startswith("/") or ".." in relative.split("/"):
                raise DataError(f"{shown(source)}, {relative}: points outside the folder; rename it")
            label = f"{shown(source)}, {relative}"
            _copy(system, name, info.get("size"), target / relative, label, MAX_MEMBER_BYTES, should_stop)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def _copy(system, path: str, size: int | None, target: Path, label: str, limit: int, should_stop) -> None:
    if size is not None and size > limit:
        raise DataError(f"{label}: {size} bytes, expected at most {limit}; split it")
    done = 0
    with atomic_path(target) as temporary, system.open(path, "rb") as stream, temporary.open("wb") as out:
        while block := stream.read(_BLOCK_BYTES):
            if should_stop():
                raise Interrupted(f"{label}: stopped while downloading; run again")
            done += len(block)
            if done > limit:
                raise DataError(f"{label}: more than {limit} bytes; split it")
            out.write(block)
    if size is not None and done != size:
        target.unlink()
        raise EnvironmentFailure(f"{label}: {done} of {size} bytes arrived; run again")
