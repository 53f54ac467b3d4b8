"""One accepted request of the endpoint, as stored in the database and its folder."""

import dataclasses
from pathlib import Path
from typing import Any

from sa3dist.serve.tables import FINISHED, jobs


@dataclasses.dataclass(frozen=True)
class Job:
    """One accepted request.

    id         32 hexadecimal digits
    number     increases in order of arrival
    app, key   the application in the request's address, and the id of the key that made it
    request    the client's JSON
    settings   the trainer's settings; they override and extend ``request``
    state      QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED; or DELETED, in results of ``changed_since`` only
    cancel     whether cancellation was requested while it ran
    fence      number of the newest attempt; 0 before the first
    attempts, failures               counts; see leases.py
    host, executor, devices          where and how it runs, and numbers of the GPUs if any
    stage      current stage of the trainer: base, encode, train, ...
    step, steps   finished and requested steps
    error      {"detail": text, "error_type": word}, or {"detail": [...]} with refused fields
    result     the trainer's result.json; each file also has ``path``, relative to ``folder``
    created, started, finished, updated   seconds since 1970
    folder     contains all files of the job
    """

    id: str
    number: int
    app: str
    key: str
    request: dict[str, Any]
    settings: dict[str, Any]
    priority: int
    created: float
    state: str
    cancel: bool
    fence: int
    host: str | None
    executor: str | None
    devices: list[int] | None
    attempts: int
    failures: int
    retries: int
    stage: str | None
    step: int
    steps: int
    exit_code: int | None
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    started: float | None
    finished: float | None
    updated: float
    webhook: str | None
    folder: Path

    @property
    def is_finished(self) -> bool:
        return self.state in FINISHED

    @property
    def attempt_folder(self) -> Path:
        """Folder of the newest attempt: log.txt, and the run's output_dir run/ (metrics.jsonl, status.json, ...)."""
        # One folder for all attempts on a cluster: the next attempt watches the same run.
        return self.folder / (f"attempt-{self.fence}" if self.executor in (None, "local") else "cluster")


COLUMNS = [jobs.c[field.name] for field in dataclasses.fields(Job) if field.name != "folder"]
