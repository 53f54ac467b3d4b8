"""Download one remote file: resume, retry with growing pauses, and never mix two versions of the file."""

import html
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem

from sa3dist.errors import DataError, EnvironmentFailure, Interrupted, SA3DistError, printable

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Bytes of one request. After an attempt without progress requests get smaller, down to the second number.
BLOCK_BYTES = 8 << 20
SMALLEST_BLOCK_BYTES = 64 << 10
# Half a minute in total outlasts a server's restart. Any progress resets the count.
RETRY_PAUSES_SECONDS = (1, 2, 4, 8, 16)
# A connection that is silent for this long counts as broken; a slow but steady one may take any time.
CONNECT_SECONDS = 30
SILENT_SECONDS = 60
# The values a server gives for these keys identify the version of a file.
_VERSION_KEYS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "md5Hash", "generation")


def version_of(info: dict[str, Any]) -> dict[str, str]:
    """Identifies the version of a remote file; empty if the server gives nothing to identify it."""
    return {key: str(info[key]) for key in _VERSION_KEYS if info.get(key)}


def remote_info(system: AbstractFileSystem, path: str, label: str, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """fsspec's info of ``path``. Raises like ``download``."""
    return query(lambda: system.info(path), label, should_stop)


def query(call: Callable[[], Result], label: str, should_stop: Callable[[], bool]) -> Result:
    """The result of a call of a file system, with retries. Raises like ``download``."""
    return retry(call, label, should_stop, progressed=lambda: False)


def download(
    system: AbstractFileSystem,
    path: str,
    info: dict[str, Any],
    part: Path,
    label: str,
    limit: int,
    should_stop: Callable[[], bool],
) -> None:
    """Download ``path`` to ``part``, continuing after the bytes in ``part``, which must be of the same version.

    info    from ``remote_info``
    limit   maximum size in bytes
    label   name of the file in messages
    Raises DataError if the file does not exist, may not be read or is too large; EnvironmentFailure if the connection
    keeps breaking or the file changes meanwhile; Interrupted. ``part`` then has the bytes that have arrived.
    """
    size = info.get("size")
    if size is not None and size > limit:
        raise DataError(f"{label}: {size} bytes, expected at most {limit}; split it, or raise max_download_bytes")
    transfer = _Transfer(system, path, size, part, label, limit, should_stop)
    retry(transfer.attempt, label, should_stop, transfer.progressed)
    if "http" in system.protocol:
        # Some web servers send an error or login page with status 200.
        with part.open("rb") as stream:
            description = describe_non_file(stream.read(HEAD_BYTES))
        if description is not None:
            part.unlink()
            raise DataError(f"{label}: the server sends {description}")
    if version_of(info):
        system.invalidate_cache()
        if version_of(remote_info(system, path, label, should_stop)) != version_of(info):
            part.unlink(missing_ok=True)
            raise EnvironmentFailure(f"{label}: changed while it was downloaded; run again")


class Attempts:
    """Progress of repeated attempts to download one file.

    block     bytes per request; 0: one stream for all, which starts again from the beginning if it breaks
    begun     bytes present when the last attempt began
    reached   bytes present now
    """

    def __init__(self, in_parts: bool = True) -> None:
        self.block = BLOCK_BYTES if in_parts else 0
        self.begun = self.reached = 0

    def progressed(self) -> bool:
        """Whether the failed attempt made progress; if not, the next request is smaller."""
        progressed = self.block > 0 and self.reached > self.begun
        if self.block and not progressed:
            self.block = max(SMALLEST_BLOCK_BYTES, self.block // 4)
        return progressed


class _Transfer(Attempts):
    """Attempts at a whole file."""

    def __init__(
        self,
        system: AbstractFileSystem,
        path: str,
        size: int | None,
        part: Path,
        label: str,
        limit: int,
        should_stop: Callable[[], bool],
    ) -> None:
        # A server's ranges can only be checked against a known length; otherwise use one stream.
        super().__init__(in_parts=bool(size))
        self.system, self.path, self.size = system, path, size
        self.part, self.label, self.limit, self.should_stop = part, label, limit, should_stop

    def attempt(self) -> None:
        """Continue after the bytes in ``part``, to the end."""
        present = self.part.stat().st_size if self.part.exists() else 0
        self.begun = self.reached = present if self.block and present <= self.size else 0
        try:
            self._read()
        except ValueError:
            # fsspec raises it if the server does not support ranges: read everything in one stream.
            if not self.block:
                raise
            self.block = self.begun = self.reached = 0
            self._read()
        if self.size is not None and self.reached != self.size:
            raise OSError(f"{self.reached} of {self.size} bytes arrived")

    def _read(self) -> None:
        # No truncation: another process may be completing the same version of the same file, byte for byte.
        mode = "r+b" if self.part.exists() else "w+b"
        options = {"block_size": self.block, "cache_type": "none"} if self.block else {"block_size": 0}
        with self.system.open(self.path, "rb", **options) as stream, self.part.open(mode) as out:
            if self.reached:
                stream.seek(self.reached)
            out.seek(self.reached)
            while block := stream.read(self.block or BLOCK_BYTES):
                if self.should_stop():
                    raise Interrupted(f"{self.label}: stopped while downloading; run again")
                if self.reached + len(block) > self.limit:
                    raise DataError(
                        f"{self.label}: more than {self.limit} bytes; split it, or raise max_download_bytes"
                    )
                out.write(block)
                # Write before counting it as progress.
                out.flush()
                self.reached += len(block)
            out.truncate(self.reached)


def retry(
    work: Callable[[], Result], label: str, should_stop: Callable[[], bool], progressed: Callable[[], bool]
) -> Result:
    """Call ``work`` until it succeeds, with growing pauses, while the failures may be temporary.

    progressed   whether the failed attempt made progress, which resets the count of failures
    Raises DataError for a permanent failure, EnvironmentFailure after the last retry, Interrupted.
    """
    failures = 0
    while True:
        try:
            return work()
        except SA3DistError:
            raise
        except Exception as error:
            if isinstance(error.__cause__, SA3DistError):
                # fsspec's http file system reports every failure of ``info`` as "not found".
                raise error.__cause__ from error
            problem = _refusal(error, label)
            if problem is not None:
                raise problem from error
            failures = 1 if progressed() else failures + 1
            if failures > len(RETRY_PAUSES_SECONDS):
                reason = _reason(error)
                raise EnvironmentFailure(f"{label}: download failed ({reason}); run again to continue") from error
            pause = RETRY_PAUSES_SECONDS[failures - 1]
            log.info("%s: %s; trying again in %g s", label, _reason(error), pause)
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline:
            if should_stop():
                raise Interrupted(f"{label}: stopped while downloading; run again")
            time.sleep(min(0.2, pause))


def _refusal(error: Exception, label: str) -> DataError | None:
    """The DataError for a permanent failure; None if it may be temporary."""
    cause, status = _cause(error)
    if status == 407 or type(cause).__name__ == "ClientHttpProxyError":
        return DataError(f"{label}: the proxy refuses it (status {status}); check http_proxy, https_proxy and no_proxy")
    # aiohttp's TooManyRedirects, NonHttpUrlRedirectClientError and InvalidUrlRedirectClientError.
    if "Redirect" in type(cause).__name__:
        return DataError(f"{label}: redirects without end, or to no http(s) address; check the address")
    if isinstance(cause, FileNotFoundError) or status in (404, 410):
        return DataError(f"{label}: not found; check the address")
    if isinstance(cause, PermissionError) or status in (401, 403) or type(cause).__name__ == "NoCredentialsError":
        return DataError(f"{label}: access denied; check the address and the credentials")
    return None


def _reason(error: Exception) -> str:
    cause, status = _cause(error)
    # Remove queries and passwords: a redirect's query may be a signature that grants access to the file.
    text = re.sub(r"(://[^\s?'\"]*)\?[^\s'\")]*", r"\1", str(cause) or type(cause).__name__)
    text = re.sub(r"://[^\s/'\"]*@", "://", text)
    return f"status {status}" if status and status >= 400 else printable(text)[:200]


def _cause(error: Exception) -> tuple[BaseException, int | None]:
    """The most specific exception, and its HTTP status."""
    cause = error.__cause__
    # fsspec's http file system reports every failure as "not found", with the real one as its cause. Others do better.
    if cause is None or not type(cause).__module__.startswith(("aiohttp", "asyncio", "builtins")):
        cause = error
    return cause, getattr(cause, "status", None)


# Enough for the beginning of a web page.
HEAD_BYTES = 4096
_PAGE = re.compile(rb"<(?:!doctype\s+html|html|head|body|script|meta|title)\b", re.IGNORECASE)
_XML = re.compile(rb"<(?:\?xml|error)\b", re.IGNORECASE)
_TITLE = re.compile(rb"<title[^>]*>(.{1,200}?)</title>", re.IGNORECASE | re.DOTALL)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)


def describe_non_file(head: bytes) -> str | None:
    """Describe what a server sends instead of a file (web page, error, Git LFS pointer); None if it is a file."""
    text = _COMMENT.sub(b"", head).lstrip(b"\xef\xbb\xbf \t\r\n")
    if _PAGE.match(text) or (_XML.match(text) and _PAGE.search(text)):
        title = _TITLE.search(text)
        text = " ".join(html.unescape(title[1].decode("utf-8", "replace")).split()) if title else ""
        text = "".join(character for character in text if character.isprintable())[:80]
        return f"a web page{f' ({text!r})' if text else ''}; is it a share link? Give the address of the file itself"
    if _XML.match(text):
        return "an answer in XML, an error message perhaps; check the address"
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer that stands for the file; give the address of the file itself, or run git lfs pull"
    return None
