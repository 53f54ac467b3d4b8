"""The jobs of the endpoint: submitted, looked up, cancelled, deleted. Who runs them is in leases.py."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import and_, case, func, or_, select, tuple_
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

# The hosted endpoint's number.
RETRIES = 10
# Settings of a job that name files it reads and the folder it works in.
PLACES = ("audio_data_url", "lora_checkpoint_url", "work_dir")
WORK_NAME = "work"
# Jobs that one transaction deletes.
MOST_DELETED = 500
# Transactions may become visible this much later than the time they have set.
OVERLAP_SECONDS = 5.0
# A snapshot that begins holds unfinished jobs and those that ended so shortly ago; older ones are read one by one.
RECENT_SECONDS = 600.0
# By then every server has seen that a job was deleted.
FORGET_SECONDS = 24 * 3600
DAY_SECONDS = 24 * 3600
CLIENT_CANCELLED = {"detail": "Request was cancelled by the client", "error_type": "client_cancelled"}


class QueueFull(SA3DistError):
    """More jobs are waiting than this one accepts."""


class Unfinished(SA3DistError):
    """A job that waits or runs cannot be deleted; it has to be cancelled first."""


def places_of(settings: dict[str, Any]) -> list[str]:
    """What a job's settings name of ``PLACES``."""
    return [settings[name] for name in PLACES if isinstance(settings.get(name), str)]


def _take_along(work: Path, folder: Path) -> None:
    """Move what no job needs any more into a deleted one's folder: it goes with that, be it after a kill."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(work, folder / WORK_NAME)
    except OSError:
        # It is not there, or on another disk.
        shutil.rmtree(work, ignore_errors=True)


# The place of a reader in the changes: when it read, and what was new at that time, by id and revision.
Token = tuple[float, frozenset[tuple[str, int]]]


class JobStore:
    """The jobs of one database.

    folder   where the jobs' own folders are; unset = ``jobs`` beside an SQLite file
    Every method may raise DatabaseAway.
    """

    def __init__(self, url: str, folder: Path | None = None) -> None:
        self.url = url
        self.database = Database(url)
        if folder is None and self.database.folder_of_file is None:
            raise ConfigError("database: with PostgreSQL the folder of the jobs' files has to be given")
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
        """Accept a request: once this returns, it is finished exactly once, whatever is killed meanwhile.

        priority        lower is earlier; equal ones in the order of arrival
        dedup           while a job of this value is unfinished, that one is returned
        start_timeout   seconds after which a job that never ran ends FAILED with startup_timeout
        max_queue       raises QueueFull when more jobs than that wait
        settings        what the trainer is given in the place of what ``request`` says, or beside it
        retries         failed attempts that are followed by another one
        keep_seconds    how long behind its end ``retention`` leaves it, whatever else it keeps
        """
        settings = settings or {}
        row = {
            "id": uuid.uuid4().hex,
            "app": app,
            "key": key,
            "request": request,
            "settings": settings,
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
                # Another server has accepted the same at the same moment. It may even be finished when looked for.
                if dedup is None:
                    raise

    def _insert(self, row: dict[str, Any], max_queue: int | None) -> Job:
        with self.database.writing(alone=max_queue is not None) as connection:
            if row["dedup"] is not None:
                alike = select(*COLUMNS).where(jobs.c.dedup == row["dedup"], jobs.c.state.in_(UNFINISHED))
                if (found := connection.execute(alike).one_or_none()) is not None:
                    return self.of_row(found)
            if max_queue is not None:
                waiting = connection.scalar(select(func.count()).where(jobs.c.state == QUEUED))
                if waiting > max_queue:
                    raise QueueFull(f"{waiting} requests are waiting, more than {max_queue}; try again later")
            return self.of_row(connection.execute(jobs.insert().values(row).returning(*COLUMNS)).one())

    def get(self, job_id: str) -> Job | None:
        """The job as it is now; None for one that is not there, or was deleted."""
        with self.database.reading() as connection:
            return self._find(connection, job_id)

    def list(self, key: str | None = None, limit: int = 100, before: int | None = None) -> list[Job]:
        """The newest jobs, newest first. key: of that one alone; before: older than the job of that ``number``."""
        condition = [jobs.c.state != DELETED]
        condition += [] if key is None else [jobs.c.key == key]
        condition += [] if before is None else [jobs.c.number < before]
        with self.database.reading() as connection:
            found = select(*COLUMNS).where(*condition).order_by(jobs.c.number.desc()).limit(limit)
            return [self.of_row(row) for row in connection.execute(found)]

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state that any is in."""
        with self.database.reading() as connection:
            counted = select(jobs.c.state, func.count()).where(jobs.c.state != DELETED).group_by(jobs.c.state)
            return dict(map(tuple, connection.execute(counted)))

    def changed_since(self, token: Token | None) -> tuple[list[Job], Token]:
        """The jobs that have changed since the call that returned ``token``, and the token for the next call.

        token   None: all that are unfinished or ended in the last ten minutes
        A job that was deleted comes once more, with the state DELETED.
        """
        if token is None:
            recent = or_(jobs.c.state.in_(UNFINISHED), jobs.c.updated > now() - RECENT_SECONDS)
            condition, known = and_(jobs.c.state != DELETED, recent), frozenset()
        else:
            read_at, known = token
            condition = jobs.c.updated > read_at - OVERLAP_SECONDS
        with self.database.reading() as connection:
            # Before the rows: what becomes visible behind them has set a later time, or is overlapped.
            read_at = connection.scalar(select(now()))
            found = select(*COLUMNS, jobs.c.revision).where(condition).order_by(jobs.c.updated)
            rows = connection.execute(found).all()
        newest = frozenset((row.id, row.revision) for row in rows if row.updated > read_at - OVERLAP_SECONDS)
        return [self.of_row(row) for row in rows if (row.id, row.revision) not in known], (read_at, newest)

    def queue_position(self, job_id: str) -> int | None:
        """How many jobs go before this one; None when it does not wait."""
        mine = select(jobs.c.priority, jobs.c.number).where(jobs.c.id == job_id, jobs.c.state == QUEUED)
        with self.database.reading() as connection:
            place = connection.execute(mine).one_or_none()
            if place is None:
                return None
            earlier = tuple_(jobs.c.priority, jobs.c.number) < tuple_(*place)
            return connection.scalar(select(func.count()).where(jobs.c.state == QUEUED, earlier))

    def cancel(self, job_id: str) -> Job | None:
        """Ask for a job's end; the job after that: CANCELLED when it waited, still RUNNING with ``cancel`` when it ran,
        as it was when it had ended. None when there is none. An equal request after it is no replay."""
        # What waits to be continued on a cluster may still be there: the next attempt has to look.
        elsewhere = and_(jobs.c.executor.is_not(None), jobs.c.executor != "local")
        this = jobs.c.id == job_id
        with self.database.writing() as connection:
            ask = and_(this, or_(jobs.c.state == RUNNING, and_(jobs.c.state == QUEUED, elsewhere)))
            connection.execute(jobs.update().where(ask, jobs.c.cancel == 0).values(changed(cancel=1, dedup=None)))
            waits = and_(this, jobs.c.state == QUEUED, jobs.c.cancel == 0)
            end_jobs(connection, waits, CANCELLED, error=CLIENT_CANCELLED)
            return self._find(connection, job_id)

    def delete(self, job_id: str) -> bool:
        """Remove a finished job with all its files; whether there was one. Raises Unfinished."""
        with self.database.writing(alone=True) as connection:
            job = self._find(connection, job_id)
            if job is None:
                return False
            if not job.is_finished:
                raise Unfinished(f"{job_id}: is {job.state}; cancel it first")
            self._make_deleted(connection, jobs.c.id == job_id)
        # The row first: what a killed server leaves of the folder, ``sweep`` removes.
        shutil.rmtree(job.folder, ignore_errors=True)
        return True

    def retention(self, days: float | None) -> int:
        """Delete the jobs that ended more than ``days`` ago, or longer than they asked to be kept; how many."""
        asked, count = jobs.c.keep_seconds, 0
        kept = asked if days is None else case((asked < days * DAY_SECONDS, asked), else_=days * DAY_SECONDS)
        old = and_(jobs.c.state.in_(FINISHED), jobs.c.finished + kept < now())
        while True:
            with self.database.writing(alone=True) as connection:
                ended = self._make_deleted(connection, old)
            for job_id in ended:
                shutil.rmtree(self.folder / job_id, ignore_errors=True)
            count += len(ended)
            if len(ended) < MOST_DELETED:
                return count

    def work_folder(self, key: str, data: str) -> Path:
        """Where jobs of ``key`` on the same ``data`` share shards and latents; it goes with the last of them."""
        return self.folder.parent / WORK_NAME / digest_of(key, data)[:32]

    def places(self, unfinished: bool = False, without: str | None = None) -> set[str]:
        """What jobs read and where they work, as ``PLACES`` name it.

        unfinished   of those alone that wait or run        without   of all but this one
        """
        states = jobs.c.state.in_(UNFINISHED if unfinished else (*UNFINISHED, *FINISHED))
        with self.database.reading() as connection:
            return self._places(connection, and_(states, jobs.c.id != without) if without else states)

    def sweep(self) -> None:
        """Remove what killed servers have left of the folders of deleted jobs, and forget those jobs after a day."""
        with self.database.reading() as connection:
            is_old = jobs.c.updated < now() - FORGET_SECONDS
            deleted = connection.execute(select(jobs.c.id, is_old).where(jobs.c.state == DELETED)).all()
        for job_id, _ in deleted:
            shutil.rmtree(self.folder / job_id, ignore_errors=True)
        for job_id, old in deleted:
            # What could not be removed is tried again next time.
            if old and not (self.folder / job_id).exists():
                with self.database.writing() as connection:
                    connection.execute(jobs.delete().where(jobs.c.id == job_id))

    def close(self) -> None:
        """Let go of the database."""
        self.database.close()

    def _find(self, connection: Any, job_id: str) -> Job | None:
        row = connection.execute(select(*COLUMNS).where(jobs.c.id == job_id, jobs.c.state != DELETED)).one_or_none()
        return None if row is None else self.of_row(row)

    def _places(self, connection: Any, condition: Any) -> set[str]:
        named = [jobs.c.settings[name].as_string() for name in PLACES]
        found = connection.execute(select(*named).where(condition)).all()
        return {place for row in found for place in row if place is not None}

    def _make_deleted(self, connection: Any, condition: Any) -> list[str]:
        """In a transaction that is alone: nobody begins a job meanwhile whose folder of work is taken away."""
        ended = connection.execute(select(jobs.c.id, jobs.c.settings).where(condition).limit(MOST_DELETED)).all()
        ids = [row.id for row in ended]
        nothing = {"request": {}, "settings": {}, "error": None, "result": None, "webhook": None}
        connection.execute(jobs.update().where(jobs.c.id.in_(ids)).values(changed(state=DELETED, **nothing)))
        connection.execute(deliveries.delete().where(deliveries.c.job_id.in_(ids)))
        left = self._places(connection, jobs.c.state != DELETED) if ended else set()
        for row in ended:
            work = row.settings.get("work_dir")
            if work is not None and work not in left:
                _take_along(Path(work), self.folder / row.id)
        return ids

    def of_row(self, row: Any) -> Job:
        """The job of a row with ``COLUMNS``."""
        values = {column.name: getattr(row, column.name) for column in COLUMNS}
        return Job(**values | {"cancel": bool(row.cancel), "folder": self.folder / row.id})
