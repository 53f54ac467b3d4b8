"""Who runs a job: a claim with a lease and a number (fence), under which alone the job's row may be changed.

A lease ends by the database's clock. Who holds it counts by its own, from before it asked, and so stops before that.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import sqlalchemy
from sqlalchemy import and_, func, or_, select

from sa3dist.serve.job import COLUMNS, Job
from sa3dist.serve.jobs import CLIENT_CANCELLED, JobStore
from sa3dist.serve.tables import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, changed, end_jobs, jobs, now

LEASE_SECONDS = 30.0
NOT_STARTED = {"detail": "Request did not start within the time it allowed", "error_type": "startup_timeout"}
LOST = {"detail": "The processes that ran the request were lost, too often", "error_type": "runner_disconnected"}
# Before an attempt that follows a failed one: a cause that passes is given as long, doubled each time.
FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Place:
    """What one server runs jobs with.

    owner, host      names for people; on one host all servers give the same ``host``
    executor         local, slurm or kubernetes
    devices          numbers of the GPUs, or of the slots where there is none
    devices_per_job  how many one job is given
    limit            most jobs that run at once, on all hosts together; None: as many as there are devices
    lease_seconds    after which a job that nobody renews is taken over
    """

    owner: str
    host: str
    executor: str
    devices: Collection[int]
    devices_per_job: int = 1
    limit: int | None = None
    lease_seconds: float = LEASE_SECONDS


class Leases:
    """Claims on the jobs of one store. Every method may raise DatabaseAway."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._database = store.database

    def end_overdue(self) -> None:
        """Take back what nobody renews; end what had to start and did not. Called before each claim."""
        expired = and_(jobs.c.state == RUNNING, jobs.c.lease_until < now())
        with self._database.writing(alone=True) as connection:
            late = and_(jobs.c.state == QUEUED, jobs.c.attempts == 0, jobs.c.start_until < now())
            end_jobs(connection, late, FAILED, error=NOT_STARTED)
            # Its trainer has ended itself before the lease did. On a cluster it has not: the next attempt sees to it.
            here = or_(jobs.c.executor.is_(None), jobs.c.executor == "local")
            end_jobs(connection, and_(expired, jobs.c.cancel == 1, here), CANCELLED, error=CLIENT_CANCELLED)
            spent = and_(expired, jobs.c.failures >= jobs.c.retries, jobs.c.cancel == 0)
            end_jobs(connection, spent, FAILED, error=LOST)
            again = changed(state=QUEUED, lease_until=None, failures=jobs.c.failures + 1)
            connection.execute(jobs.update().where(expired).values(again))

    def claim(self, place: Place) -> Job | None:
        """The next job for ``place``, RUNNING under a new ``fence``; None where there is none, or no room."""
        with self._database.writing(alone=True) as connection:
            waits = and_(jobs.c.state == QUEUED, or_(jobs.c.not_before.is_(None), jobs.c.not_before <= now()))
            devices = self._free_devices(connection, place)
            if devices is None:
                # To be cancelled on a cluster: that takes no room.
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
                owner=place.owner,
                host=place.host,
                executor=place.executor,
                devices=devices,
                exit_code=None,
                lease_until=now() + place.lease_seconds,
                started=func.coalesce(jobs.c.started, now()),
            )
            claimed = jobs.update().where(jobs.c.id == job_id).values(values).returning(*COLUMNS)
            return self._store.of_row(connection.execute(claimed).one())

    def _free_devices(self, connection: sqlalchemy.Connection, place: Place) -> list[int] | None:
        running = connection.execute(select(jobs.c.host, jobs.c.devices).where(jobs.c.state == RUNNING)).all()
        if place.limit is not None and len(running) >= place.limit:
            return None
        taken = {device for host, devices in running if host == place.host for device in devices or ()}
        free = sorted(set(place.devices) - taken)
        return free[: place.devices_per_job] if len(free) >= place.devices_per_job else None

    def renew(self, job: Job, seconds: float) -> bool:
        """Make the lease end ``seconds`` from now; False when it is over, or another attempt has begun."""
        with self._database.writing() as connection:
            alive = and_(_held(job), jobs.c.lease_until >= now())
            # No change that anybody shows: ``updated`` stays.
            renewed = jobs.update().where(alive).values(lease_until=now() + seconds)
            return connection.execute(renewed).rowcount == 1

    def cancelled(self, job: Job) -> bool | None:
        """Whether the job's end was asked for; None when this attempt no longer holds it."""
        with self._database.reading() as connection:
            found = connection.scalar(select(jobs.c.cancel).where(_held(job)))
            return None if found is None else bool(found)

    def publish(self, job: Job, **values: Any) -> bool:
        """Set what people see of a running job: ``stage``, ``step``; False when this attempt no longer holds it."""
        with self._database.writing() as connection:
            return connection.execute(jobs.update().where(_held(job)).values(changed(**values))).rowcount == 1

    # Ending an attempt asks for no living lease, the number is enough: finished work is not thrown away because the
    # database was out of reach. Each returns whether it was this attempt that ended it; asked again, False.

    def succeed(self, job: Job, result: dict[str, Any]) -> bool:
        """The job is done."""
        return self._end(job, SUCCEEDED, result=result, error=None, exit_code=0, step=jobs.c.steps)

    def fail(self, job: Job, error: dict[str, Any], exit_code: int | None) -> bool:
        """The job has failed, and is not tried again."""
        return self._end(job, FAILED, error=error, exit_code=exit_code)

    def cancel(self, job: Job, exit_code: int | None) -> bool:
        """The job was asked to end, and nothing of it runs any more."""
        return self._end(job, CANCELLED, error=CLIENT_CANCELLED, exit_code=exit_code)

    def _end(self, job: Job, state: str, **values: Any) -> bool:
        with self._database.writing() as connection:
            return bool(end_jobs(connection, _held(job), state, **values))

    def try_again(self, job: Job, error: dict[str, Any], exit_code: int | None, counts: bool) -> bool:
        """Queue the job once more, unless its end was asked for; FAILED with ``error`` when its retries are used up.

        counts   whether this attempt uses one up
        """
        with self._database.writing() as connection:
            asked = and_(_held(job), jobs.c.cancel == 1, jobs.c.executor == "local")
            if end_jobs(connection, asked, CANCELLED, error=CLIENT_CANCELLED, exit_code=exit_code):
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
