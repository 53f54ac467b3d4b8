"""Leases on jobs: a claim gives a lease and a number (fence); only the holder of that number may change the job's row.

A lease ends by the database's clock. Its holder measures by its own clock, from before the request, and so stops
earlier.
"""

from typing import Any

import sqlalchemy
from sqlalchemy import and_, func, or_, select

from sa3dist.serve.job import COLUMNS, Job
from sa3dist.serve.job_store import CLIENT_CANCELLED, JobStore
from sa3dist.serve.options import RunOptions
from sa3dist.serve.tables import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, changed, end_jobs, jobs, now

NOT_STARTED = {"detail": "Request did not start within the time it allowed", "error_type": "startup_timeout"}
LOST = {"detail": "The processes that ran the request were lost, too often", "error_type": "runner_disconnected"}
# Pause before the attempt after a failed one, doubled each time, to let temporary causes pass.
FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 120.0


class Leases:
    """Claims on the jobs of one store. Every method may raise DatabaseAway."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._database = store.database

    def end_overdue(self) -> None:
        """Queue jobs again whose lease has ended; fail jobs that did not start in time. Called before each claim."""
        expired = and_(jobs.c.state == RUNNING, jobs.c.lease_until < now())
        with self._database.writing(alone=True) as connection:
            late = and_(jobs.c.state == QUEUED, jobs.c.attempts == 0, jobs.c.start_until < now())
            end_jobs(connection, late, FAILED, error=NOT_STARTED)
            # A local trainer has ended itself before its lease. A cluster's has not: the next attempt cancels it.
            here = or_(jobs.c.executor.is_(None), jobs.c.executor == "local")
            end_jobs(connection, and_(expired, jobs.c.cancel == 1, here), CANCELLED, error=CLIENT_CANCELLED)
            spent = and_(expired, jobs.c.failures >= jobs.c.retries, jobs.c.cancel == 0)
            end_jobs(connection, spent, FAILED, error=LOST)
            again = changed(state=QUEUED, lease_until=None, failures=jobs.c.failures + 1)
            connection.execute(jobs.update().where(expired).values(again))

    def claim(self, options: RunOptions) -> Job | None:
        """Claim the next job for this host: RUNNING under a new ``fence``. None if none waits or no device is free."""
        with self._database.writing(alone=True) as connection:
            waits = and_(jobs.c.state == QUEUED, or_(jobs.c.not_before.is_(None), jobs.c.not_before <= now()))
            devices = self._free_devices(connection, options)
            if devices is None:
                # A job to be cancelled on a cluster needs no device.
                waits, devices = and_(waits, jobs.c.cancel == 1), []
            turn = (
                select(jobs.c.id).where(waits).order_by(jobs.c.cancel.desc(), jobs.c.priority, jobs.c.number).limit(1)
            )
            job_id = connection.scalar(turn)
            if job_id is None:
                return None
            values = changed(
                state=RUNNING,
                fence=jobs.c.fence + 1,
                attempts=jobs.c.attempts + 1,
                host=options.host,
                executor=options.executor,
                devices=devices,
                exit_code=None,
                lease_until=now() + options.lease_seconds,
                started=func.coalesce(jobs.c.started, now()),
            )
            claimed = jobs.update().where(jobs.c.id == job_id).values(values).returning(*COLUMNS)
            return self._store.of_row(connection.execute(claimed).one())

    def _free_devices(self, connection: sqlalchemy.Connection, options: RunOptions) -> list[int] | None:
        running = connection.execute(select(jobs.c.host, jobs.c.devices).where(jobs.c.state == RUNNING)).all()
        if options.limit is not None and len(running) >= options.limit:
            return None
        taken = {device for host, devices in running if host == options.host for device in devices or ()}
        free = sorted(set(options.devices) - taken)
        # A slot is one job, however many GPUs a cluster gives it.
        count = options.devices_per_job if options.gpus else 1
        return free[:count] if len(free) >= count else None

    def renew(self, job: Job, seconds: float) -> bool:
        """Extend the lease to ``seconds`` from now. False if it has ended or another attempt has begun."""
        with self._database.writing() as connection:
            alive = and_(_held(job), jobs.c.lease_until >= now())
            # ``updated`` stays: nothing visible changes.
            renewed = jobs.update().where(alive).values(lease_until=now() + seconds)
            return connection.execute(renewed).rowcount == 1

    def cancelled(self, job: Job) -> bool | None:
        """Whether cancellation was requested; None if this attempt no longer holds the job."""
        with self._database.reading() as connection:
            cancel = connection.scalar(select(jobs.c.cancel).where(_held(job)))
            return None if cancel is None else bool(cancel)

    def publish(self, job: Job, **values: Any) -> bool:
        """Set visible values of a running job (``stage``, ``step``). False if this attempt no longer holds it."""
        with self._database.writing() as connection:
            return connection.execute(jobs.update().where(_held(job)).values(changed(**values))).rowcount == 1

    # The following methods end an attempt. They require the fence, but not a valid lease, so that finished work is not
    # lost because the database was away. Each returns whether this attempt ended the job; False on a second call.

    def succeed(self, job: Job, result: dict[str, Any]) -> bool:
        """End a job that succeeded."""
        return self._end(job, SUCCEEDED, result=result, error=None, exit_code=0, step=jobs.c.steps)

    def fail(self, job: Job, error: dict[str, Any], exit_code: int | None) -> bool:
        """End a job that failed and is not tried again."""
        return self._end(job, FAILED, error=error, exit_code=exit_code)

    def cancel(self, job: Job, exit_code: int | None) -> bool:
        """End a job that was cancelled, once all its processes have ended."""
        return self._end(job, CANCELLED, error=CLIENT_CANCELLED, exit_code=exit_code)

    def _end(self, job: Job, state: str, **values: Any) -> bool:
        with self._database.writing() as connection:
            return bool(end_jobs(connection, _held(job), state, **values))

    def try_again(self, job: Job, error: dict[str, Any], exit_code: int | None, counts: bool) -> bool:
        """Queue the job again, unless it was cancelled. It ends FAILED with ``error`` if no retries are left.

        counts   whether this attempt uses up a retry
        """
        with self._database.writing() as connection:
            cancelled = and_(_held(job), jobs.c.cancel == 1, jobs.c.executor == "local")
            if end_jobs(connection, cancelled, CANCELLED, error=CLIENT_CANCELLED, exit_code=exit_code):
                return True
            if counts and end_jobs(
                connection,
                and_(_held(job), jobs.c.failures >= jobs.c.retries),
                FAILED,
                error=error,
                exit_code=exit_code,
            ):
                return True
            pause = min(FIRST_PAUSE_SECONDS * 2**job.failures, LONGEST_PAUSE_SECONDS) if counts else 0.0
            again = changed(state=QUEUED, lease_until=None, exit_code=exit_code, not_before=now() + pause)
            again |= {"failures": jobs.c.failures + 1} if counts else {}
            return connection.execute(jobs.update().where(_held(job)).values(again)).rowcount == 1


def _held(job: Job) -> Any:
    return and_(jobs.c.id == job.id, jobs.c.fence == job.fence, jobs.c.state == RUNNING)
