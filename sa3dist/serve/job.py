"""One accepted request of the endpoint, as its row and its folder hold it."""

import dataclasses
from pathlib import Path
from typing import Any

from sa3dist.serve.tables import FINISHED, jobs


@dataclasses.dataclass(frozen=True)
class Job:
    """One accepted request.

    id         32 hexadecimal digits            number    counts up with arrival
    app, key   the address it came to, and the id of the key that made it
    request    what the client sent             settings  what the trainer is given beside and before that
    state      QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED, or DELETED in ``changed_since`` alone
    cancel     whether its end was asked for while it ran
    fence      number of the newest attempt, 0 before the first        attempts, failures  counts; see leases.py
    owner, host, executor, devices   who runs it, where and on which GPUs (numbers, or none)
    stage      what the trainer is at: base, encode, train, ...        step, steps  done, and asked for
    error      {"detail": text, "error_type": word}, or {"detail": [...]} with the fields that were refused
    result     the trainer's result.json; each file has ``path`` beside ``url``, relative to ``folder``
    created, started, finished, updated   seconds since 1970
    folder     all files of the job
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
    owner: str | None
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
        """Where the newest attempt writes: log.txt, and in run/ what a run leaves (metrics.jsonl, status.json ...)."""
        # On a cluster the next attempt watches the run of the one before.
        return self.folder / (f"attempt-{self.fence}" if self.executor in (None, "local") else "cluster")


COLUMNS = [jobs.c[field.name] for field in dataclasses.fields(Job) if field.name != "folder"]
