"""State shared by all routes of a server, and errors that become HTTP answers."""

import asyncio
import dataclasses
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from fastapi import Request

from sa3dist.errors import SA3DistError
from sa3dist.serve.addresses import HOSTS
from sa3dist.serve.files import FileStore, is_id
from sa3dist.serve.job import Job
from sa3dist.serve.job_store import JobStore, paths_of
from sa3dist.serve.keys import LOCAL, Caller, Keys, Signer
from sa3dist.serve.server_options import WebOptions
from sa3dist.serve.snapshot import Snapshot

# The hosted endpoint's error types for failures that are not the input's fault, and their HTTP status.
ERROR_STATUS = {
    "request_timeout": 504,
    "startup_timeout": 504,
    "runner_scheduling_failure": 503,
    "runner_connection_timeout": 503,
    "runner_disconnected": 503,
    "runner_connection_refused": 503,
    "runner_incomplete_response": 502,
    "runner_server_error": 500,
    "client_cancelled": 499,
    "client_disconnected": 499,
    "bad_request": 400,
    "internal_error": 500,
}
# Submits of more than a mebibyte that are processed at a time.
MAX_LARGE_BODIES = 8
RESOLVERS = 8
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1", "testserver")


class WireError(SA3DistError):
    """An HTTP error answer. detail: a text, or a list of entries by field as from ``refusal``."""

    def __init__(
        self,
        status: int,
        detail: str | list[dict[str, Any]],
        error_type: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message_of(detail))
        self.status, self.detail, self.error_type, self.headers = status, detail, error_type, headers or {}


class UnknownRequest(WireError):
    """No job of the caller has this request id."""

    def __init__(self) -> None:
        super().__init__(404, "Request not found", headers={"X-Fal-Error-Type": "not_found"})


def message_of(detail: str | list[dict[str, Any]]) -> str:
    """The error as one line of text."""
    if isinstance(detail, str):
        return detail
    return "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}".removeprefix(": ") for item in detail)


def refusal(place: list[str | int], message: str, kind: str = "value_error") -> dict[str, Any]:
    """One entry of a 422's detail."""
    return {"loc": place, "msg": message, "type": kind, "url": f"https://errors.pydantic.dev/2/v/{kind}"}


def result_file(job: Job, path: str) -> Path | None:
    """The file ``path`` of a job if its result names it, else None."""
    values = (job.result or {}).values()
    paths = {value["path"] for value in values if isinstance(value, dict) and "path" in value}
    return job.folder / path if path in paths else None


def refuse_if_full(places: asyncio.Semaphore, what: str) -> None:
    """Raises WireError if no place is free. Call it before an answer begins: its status can no longer change then."""
    if places.locked():
        retry = {"X-Fal-Needs-Retry": "1"}
        raise WireError(429, f"too many {what} at a time", "concurrent_requests_limit", retry)


@dataclasses.dataclass
class Service:
    """One server: its options and all objects that routes use."""

    options: WebOptions
    store: JobStore
    keys: Keys
    signer: Signer
    files: FileStore
    snapshot: Snapshot
    stopping: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.uploads = asyncio.Semaphore(self.options.max_uploads)
        # Streams, and requests that wait for a job's end.
        self.waiters = asyncio.Semaphore(self.options.max_waiters)
        # Further large bodies wait: each takes a few times its size in memory.
        self.large_bodies = asyncio.Semaphore(MAX_LARGE_BODIES)
        # A pool of its own: slow name lookups must not block threads that read and write.
        self.resolvers = ThreadPoolExecutor(RESOLVERS, "resolver")

    def caller(self, request: Request, is_upload: bool = False) -> Caller:
        """The caller of a request. Raises WireError if a key is required and missing or invalid.

        is_upload   also accept an upload token
        """
        scheme, _, word = request.headers.get("authorization", "").partition(" ")
        if self.options.is_open:
            return self._local(request)
        caller = None
        if scheme.lower() in ("key", "bearer"):
            caller = self.keys.caller(word.strip())
            if caller is None and is_upload:
                caller = self.signer.token_caller(word.strip(), self.keys.read())
        if caller is None:
            raise WireError(401, "invalid key credentials", headers={"WWW-Authenticate": "Key"})
        return caller

    def _local(self, request: Request) -> Caller:
        """The local user. Raises WireError for requests from other sites' pages in the user's browser."""
        for name in ("host", "origin"):
            value = request.headers.get(name, "").partition("://")[2] or request.headers.get(name, "")
            host = value.rpartition(":")[0] if not value.endswith("]") and ":" in value else value
            if value and host.strip("[]") not in LOOPBACK_NAMES and not self._is_ours(host):
                raise WireError(403, f"{name} {value[:200]!r} is not this machine; make a key: sa3dist serve keys add")
        return LOCAL

    def _is_ours(self, host: str) -> bool:
        # Includes the hosted endpoint's host names, in case they are redirected to this server.
        return host in HOSTS or host == self.options.public_url.partition("://")[2].partition(":")[0]

    async def job(self, job_id: str, caller: Caller) -> Job:
        """A job that the caller may see. Raises the same WireError whether it does not exist or is not visible."""
        job = self.snapshot.get(job_id)
        if job is None and len(job_id) == 32 and job_id.isascii() and job_id.isalnum():
            job = await asyncio.to_thread(self.store.get, job_id)
        if job is None or not caller.may_see(job.key):
            raise UnknownRequest
        return job

    def link_of_result(self, job: Job, base: str, path: str) -> str:
        """A URL of a result file that needs no key until it expires."""
        expires = int(time.time()) + self.options.link_seconds
        signature = self.signer.sign("result", [job.id, path], expires)
        return f"{base}/files/{job.id}/{quote(path)}?expires={expires}&signature={signature}"

    def trainer_path(self, caller: Caller, path: str, query: str) -> str | None:
        """The path or URL from which the trainer reads a file of this server; None for any other address.

        Only its owner may use a file, or anyone with its signed URL until that expires.
        """
        words = [unquote(word) for word in path.split("/")]
        if len(words) < 4 or words[1] != "files" or not is_id(words[2]):
            return None
        file_id, name = words[2], "/".join(words[3:])
        note = self.files.find(file_id)
        if note is not None:
            return self.files.address(note.id) if caller.may_see(note.owner) else None
        job = self.store.get(file_id)
        parameters = dict(parse_qsl(query))
        expires, signature = parameters.get("expires", ""), parameters.get("signature", "")
        signed = self.signer.fits("result", [file_id, name], expires, signature)
        path = None if job is None else result_file(job, name)
        return str(path) if path is not None and (signed or caller.may_see(job.key)) else None

    def delete(self, job: Job) -> None:
        """Remove a job and the uploads that no other job uses. Raises Unfinished."""
        if job.is_finished:
            # Uploads first: if killed in between, the job can be deleted again.
            in_use = self.store.used_paths(without=job.id)
            files = {self.files.id_of(path) for path in paths_of(job.settings) if path not in in_use}
            self.files.delete(*files - {None})
        self.store.delete(job.id)

    def remove_expired_files(self) -> None:
        """Remove expired files that no unfinished job needs."""
        in_use = {self.files.id_of(path) for path in self.store.used_paths(unfinished=True)}
        days = self.options.keep_days
        self.files.sweep(in_use, None if days is None else days * 24 * 3600)

    def check_space(self, coming: int = 0) -> None:
        """Raises WireError if too little disk space is free. coming: size of a file about to be stored."""
        # Files in another storage need no space here.
        coming = coming if self.options.storage is None else 0
        for folder in (self.options.data_dir, self.store.folder):
            free = shutil.disk_usage(folder).free
            if free - coming < self.options.min_free_bytes:
                raise WireError(
                    507,
                    f"less than {self.options.min_free_bytes >> 20} MiB would stay free here ({free >> 20} MiB are); "
                    f"delete jobs or files, then try again",
                )


def service_of(request: Request) -> Service:
    """The ``Service`` of a request's application."""
    return request.app.state.service
