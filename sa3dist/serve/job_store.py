"""The endpoint's jobs in the database: submit, look up, cancel, delete. leases.py assigns them to servers."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import and_, case, func, or_, select
from sqlalchemy.exc import IntegrityError

from sa3dist.errors import ConfigError, SA3DistError
from sa3dist.formats import digest_of
from sa3dist.serve.job import COLUMNS, Job
from sa3dist.serve.tables import (
    CANCELLED,
    DELETED,
    FINISHED,
    QUEUED,
    RUNNING,
    UNFINISHED,
    Database,
    changed,
    deliveries,
    end_jobs,
    jobs,
    now,
)

# As the hosted endpoint.
RETRIES = 10
# Settings of a job that name the files it reads and its work directory.
PATH_SETTINGS = ("audio_data_url", "lora_checkpoint_url", "work_dir")
WORK_NAME = "work"
# Jobs deleted in one transaction.
MOST_DELETED = 500
# Longest time from the ``updated`` that a transaction sets until the transaction is visible.
OVERLAP_SECONDS = 5.0
# A new snapshot contains unfinished jobs and those that ended within this time; older ones are read one by one.
RECENT_SECONDS = 600.0
# Rows of deleted jobs stay for this time, so that every server's snapshot notices the deletion.
FORGET_SECONDS = 24 * 3600
DAY_SECONDS = 24 * 3600
CLIENT_CANCELLED = {"detail": "Request was cancelled by the client", "error_type": "client_cancelled"}


class QueueFull(SA3DistError):
    """More jobs are waiting than the request or the server allows."""


class Unfinished(SA3DistError):
    """A waiting or running job cannot be deleted; cancel it first."""


def paths_of(settings: dict[str, Any]) -> list[str]:
    """The values of ``PATH_SETTINGS`` in a job's settings."""
    return [settings[name] for name in PATH_SETTINGS if isinstance(settings.get(name), str)]


def _move_aside(work: Path, folder: Path) -> None:
    """Move an unused work directory into a deleted job's folder, to be removed with it, even after a kill."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(work, folder / WORK_NAME)
    except OSError:
        # It does not exist, or is on another disk.
        shutil.rmtree(work, ignore_errors=True)


# A reader's position in the changes: time of its last read, and (id, revision) of jobs that were new then.
Token = tuple[float, frozenset[tuple[str, int]]]


class JobStore:
    """The jobs of one database.

    folder   contains the jobs' folders; default: ``jobs`` next to the SQLite file
    The folder with this folder may be moved while no server uses it: paths in it are stored relative to it.
    Every method may raise DatabaseAway.
    """

    def __init__(self, url: str, folder: Path | None = None) -> None:
        self.url = url
        self.database = Database(url)
        if folder is None and self.database.folder_of_file is None:
            raise ConfigError("database: PostgreSQL also needs a folder for the jobs' files")
        self.folder = Path(folder or self.database.folder_of_file / "jobs").absolute()
        self.folder.mkdir(parents=True, exist_ok=True)

    def submit(
        self,
        request: dict[str, Any],
        *,
        app: str,
        key: str,
        priority: int = 10,
        dedup: str | None = None,
        webhook: str | None = None,
        start_timeout: float | None = None,
        max_queue: int | None = None,
        settings: dict[str, Any] | None = None,
        retries: int = RETRIES,
        keep_seconds: float | None = None,
    ) -> Job:
        """Accept a request. Once this returns, the job is finished exactly once, whatever is killed meanwhile.

        priority        lower is earlier; equal priorities in order of arrival
        dedup           if an unfinished job has the same value, that job is returned
        start_timeout   seconds after which a job that never ran ends FAILED with startup_timeout
        max_queue       raises QueueFull if more jobs than this are waiting
        settings        the trainer's settings; they override and extend ``request``
        retries         number of failed attempts that are repeated
        keep_seconds    time after its end until ``delete_expired`` removes it, at the latest
        """
        settings = settings or {}
        inside = f"{self.folder.parent}/"
        stored = {
            name: value.removeprefix(inside) if name in PATH_SETTINGS and isinstance(value, str) else value
            for name, value in settings.items()
        }
        row = {
            "id": uuid.uuid4().hex,
            "app": app,
            "key": key,
            "request": request,
            "settings": stored,
            "priority": priority,
            "dedup": dedup,
            "webhook": webhook,
            "retries": retries,
            "keep_seconds": keep_seconds,
            "state": QUEUED,
            "created": now(),
            "updated": now(),
            "start_until": None if start_timeout is None else now() + start_timeout,
            "steps": int(settings.get("number_of_steps") or request.get("number_of_steps") or 1000),
        }
        while True:
            try:
                return self._insert(row, max_queue)
            except IntegrityError:
                # Another server has just accepted the same request. Look it up again; it may even be finished by now.
                if dedup is None:
                    raise

    def _insert(self, row: dict[str, Any], max_queue: int | None) -> Job:
        with self.database.writing(alone=max_queue is not None) as connection:
            if row["dedup"] is not None:
                same = select(*COLUMNS).where(jobs.c.dedup == row["dedup"], jobs.c.state.in_(UNFINISHED))
                if (existing := connection.execute(same).one_or_none()) is not None:
                    return self.of_row(existing)
            if max_queue is not None:
                waiting = connection.scalar(select(func.count()).where(jobs.c.state == QUEUED))
                if waiting > max_queue:
                    raise QueueFull(f"{waiting} requests are waiting, more than {max_queue}; try again later")
            return self.of_row(connection.execute(jobs.insert().values(row).returning(*COLUMNS)).one())

    def get(self, job_id: str) -> Job | None:
        """The job, read from the database; None if it does not exist or was deleted."""
        with self.database.reading() as connection:
            return self._find(connection, job_id)

    def list(self, key: str | None = None, limit: int = 100, before: int | None = None) -> list[Job]:
        """Jobs, newest first. key: only of this key; before: only jobs with a smaller ``number``."""
        condition = [jobs.c.state != DELETED]
        condition += [] if key is None else [jobs.c.key == key]
        condition += [] if before is None else [jobs.c.number < before]
        with self.database.reading() as connection:
            newest = select(*COLUMNS).where(*condition).order_by(jobs.c.number.desc()).limit(limit)
            return [self.of_row(row) for row in connection.execute(newest)]

    def changed_since(self, token: Token | None) -> tuple[list[Job], Token]:
        """Jobs that have changed since the call that returned ``token``, and the token for the next call.

        token   None: return all unfinished jobs and those that ended in the last ten minutes
        A deleted job is returned once, with state DELETED.
        """
        if token is None:
            recent = or_(jobs.c.state.in_(UNFINISHED), jobs.c.updated > now() - RECENT_SECONDS)
            condition, known = and_(jobs.c.state != DELETED, recent), frozenset()
        else:
            read_at, known = token
            condition = jobs.c.updated > read_at - OVERLAP_SECONDS
        with self.database.reading() as connection:
            # Read the time before the rows: a later commit has a later ``updated``, or is covered by the overlap.
            read_at = connection.scalar(select(now()))
            changes = select(*COLUMNS, jobs.c.revision).where(condition).order_by(jobs.c.updated)
            rows = connection.execute(changes).all()
        newest = frozenset((row.id, row.revision) for row in rows if row.updated > read_at - OVERLAP_SECONDS)
        return [self.of_row(row) for row in rows if (row.id, row.revision) not in known], (read_at, newest)

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job: if waiting, it becomes CANCELLED; if running, its runner ends it. Returns the job, if any."""
        # A job waiting to be continued may still run on a cluster: the next attempt has to cancel it there.
        elsewhere = and_(jobs.c.executor.is_not(None), jobs.c.executor != "local")
        this = jobs.c.id == job_id
        with self.database.writing() as connection:
            runs = and_(this, or_(jobs.c.state == RUNNING, and_(jobs.c.state == QUEUED, elsewhere)))
            # dedup=None: an equal request after this gets a job of its own.
            connection.execute(jobs.update().where(runs, jobs.c.cancel == 0).values(changed(cancel=1, dedup=None)))
            waits = and_(this, jobs.c.state == QUEUED, jobs.c.cancel == 0)
            end_jobs(connection, waits, CANCELLED, error=CLIENT_CANCELLED)
            return self._find(connection, job_id)

    def delete(self, job_id: str) -> bool:
        """Remove a finished job with all its files; returns whether it existed. Raises Unfinished."""
        with self.database.writing(alone=True) as connection:
            job = self._find(connection, job_id)
            if job is None:
                return False
            if not job.is_finished:
                raise Unfinished(f"{job_id}: is {job.state}; cancel it first")
            self._mark_deleted(connection, jobs.c.id == job_id)
        # The row first: if killed now, ``sweep`` removes the folder.
        shutil.rmtree(job.folder, ignore_errors=True)
        return True

    def delete_expired(self, days: float | None) -> int:
        """Delete jobs that ended more than ``days`` or their ``keep_seconds`` ago; returns how many."""
        keep, count = jobs.c.keep_seconds, 0
        if days is not None:
            keep = case((keep < days * DAY_SECONDS, keep), else_=days * DAY_SECONDS)
        expired = and_(jobs.c.state.in_(FINISHED), jobs.c.finished + keep < now())
        while True:
            with self.database.writing(alone=True) as connection:
                deleted = self._mark_deleted(connection, expired)
            for job_id in deleted:
                shutil.rmtree(self.folder / job_id, ignore_errors=True)
            count += len(deleted)
            if len(deleted) < MOST_DELETED:
                return count

    def work_folder(self, key: str, data: str) -> Path:
        """The work directory shared by all jobs of ``key`` on the same ``data``; removed with the last of them."""
        return self.folder.parent / WORK_NAME / digest_of(key, data)[:32]

    def used_paths(self, unfinished: bool = False, without: str | None = None) -> set[str]:
        """Values of ``PATH_SETTINGS`` of all jobs, or of ``unfinished`` ones only, or of all ``without`` this job."""
        states = jobs.c.state.in_(UNFINISHED if unfinished else (*UNFINISHED, *FINISHED))
        with self.database.reading() as connection:
            return self._used_paths(connection, and_(states, jobs.c.id != without) if without else states)

    def sweep(self) -> None:
        """Remove folders of deleted jobs that killed servers have left, and after a day the jobs' rows."""
        with self.database.reading() as connection:
            is_old = jobs.c.updated < now() - FORGET_SECONDS
            deleted = connection.execute(select(jobs.c.id, is_old).where(jobs.c.state == DELETED)).all()
        for job_id, _ in deleted:
            shutil.rmtree(self.folder / job_id, ignore_errors=True)
        for job_id, is_old in deleted:
            # Keep the row while the folder exists, to try again next time.
            if is_old and not (self.folder / job_id).exists():
                with self.database.writing() as connection:
                    connection.execute(jobs.delete().where(jobs.c.id == job_id))

    def close(self) -> None:
        """Close all database connections."""
        self.database.close()

    def _find(self, connection: Any, job_id: str) -> Job | None:
        row = connection.execute(select(*COLUMNS).where(jobs.c.id == job_id, jobs.c.state != DELETED)).one_or_none()
        return None if row is None else self.of_row(row)

    def _used_paths(self, connection: Any, condition: Any) -> set[str]:
        columns = [jobs.c.settings[name].as_string() for name in PATH_SETTINGS]
        rows = connection.execute(select(*columns).where(condition)).all()
        return {self._absolute(path) for row in rows for path in row if path is not None}

    def _mark_deleted(self, connection: Any, condition: Any) -> list[str]:
        """Mark jobs as deleted and move away their unused work directories; returns the jobs' ids."""
        # In an exclusive transaction, so that no job starts meanwhile in such a work directory.
        rows = connection.execute(select(jobs.c.id, jobs.c.settings).where(condition).limit(MOST_DELETED)).all()
        ids = [row.id for row in rows]
        nothing = {"request": {}, "settings": {}, "error": None, "result": None, "webhook": None}
        connection.execute(jobs.update().where(jobs.c.id.in_(ids)).values(changed(state=DELETED, **nothing)))
        connection.execute(deliveries.delete().where(deliveries.c.job_id.in_(ids)))
        in_use = self._used_paths(connection, jobs.c.state != DELETED) if rows else set()
        for row in rows:
            work = row.settings.get("work_dir")
            if work is not None and (work := self._absolute(work)) not in in_use:
                _move_aside(Path(work), self.folder / row.id)
        return ids

    def _absolute(self, path: str) -> str:
        """A stored value of ``PATH_SETTINGS``, which may also be an absolute path or an address."""
        return path if "://" in path else os.path.join(self.folder.parent, path)

    def of_row(self, row: Any) -> Job:
        """The job in a row with ``COLUMNS``."""
        values = {column.name: getattr(row, column.name) for column in COLUMNS}
        paths = {name: self._absolute(row.settings[name]) for name in PATH_SETTINGS if name in row.settings}
        values |= {"cancel": bool(row.cancel), "folder": self.folder / row.id, "settings": row.settings | paths}
        return Job(**values)
