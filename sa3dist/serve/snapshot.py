"""Recent jobs in memory, refreshed twice a second, to answer frequent requests without the database."""

import asyncio
import logging
import time

from sa3dist.serve.job import Job
from sa3dist.serve.job_store import JobStore, Token
from sa3dist.serve.tables import DELETED, QUEUED, DatabaseAway

log = logging.getLogger(__name__)

REFRESH_SECONDS = 0.5
# Finished jobs stay for this time, since waiting clients ask within seconds. Later they are read from the database.
KEEP_SECONDS = 600.0


class Snapshot:
    """Unfinished and recently finished jobs, at most about half a second old.

    Only the event loop's thread changes it; its dicts are replaced, not changed in place.

    refreshed   set at the next refresh, then replaced by a new one
    read_at     time of the last refresh, on the monotonic clock
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._token: Token | None = None
        self._jobs: dict[str, Job] = {}
        self._positions: dict[str, int] = {}
        self.refreshed = asyncio.Event()
        self.read_at = 0.0

    def get(self, job_id: str) -> Job | None:
        """The job; None if it is not in memory, though it may be in the database."""
        return self._jobs.get(job_id)

    def all(self) -> list[Job]:
        """All jobs in memory."""
        return list(self._jobs.values())

    def position(self, job: Job) -> int:
        """Number of jobs before this one in the queue."""
        return self._positions.get(job.id, len(self._positions))

    def put(self, job: Job) -> None:
        """Add a job that a request has just changed, without waiting for the next refresh."""
        known = self._jobs.get(job.id)
        if known is None or job.updated >= known.updated:
            self._apply([job])

    def drop(self, job_id: str) -> None:
        """Remove a deleted job."""
        self._jobs = {known: job for known, job in self._jobs.items() if known != job_id}

    async def refresh(self) -> None:
        """Read all changes. Raises DatabaseAway."""
        changes, self._token = await asyncio.to_thread(self._store.changed_since, self._token)
        self._apply(changes)
        self.read_at = time.monotonic()
        refreshed, self.refreshed = self.refreshed, asyncio.Event()
        refreshed.set()

    async def keep_fresh(self) -> None:
        """Refresh for ever."""
        away = False
        while True:
            try:
                await self.refresh()
                away = False
            except DatabaseAway as failure:
                if not away:
                    log.warning("%s; answering from the last snapshot", failure)
                away = True
            await asyncio.sleep(REFRESH_SECONDS)

    def _apply(self, changes: list[Job]) -> None:
        oldest = time.time() - KEEP_SECONDS
        expired = [job.id for job in self._jobs.values() if job.is_finished and (job.finished or 0) < oldest]
        if not changes and not expired:
            return
        removed = {*expired, *(job.id for job in changes if job.state == DELETED)}
        known = self._jobs | {job.id: job for job in changes}
        self._jobs = {job_id: job for job_id, job in known.items() if job_id not in removed}
        waiting = sorted((job.priority, job.number, job.id) for job in self._jobs.values() if job.state == QUEUED)
        self._positions = {job_id: position for position, (_, _, job_id) in enumerate(waiting)}
