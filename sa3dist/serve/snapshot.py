"""The jobs in memory, read again twice a second: what clients ask for most is answered without the database."""

from __future__ import annotations

import asyncio
import logging
import time

from sa3dist.serve.job import Job
from sa3dist.serve.jobs import JobStore, Token
from sa3dist.serve.tables import DELETED, QUEUED, DatabaseAway

log = logging.getLogger(__name__)

REFRESH_SECONDS = 0.5
# Finished jobs stay so long: whoever waits for one asks within seconds. Later ones are read from the database.
KEEP_SECONDS = 600.0


class Snapshot:
    """Unfinished jobs and those that ended a short time ago, as the database had them half a second ago.

    One thread at a time changes it; everything is replaced, nothing is changed in place.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._token: Token | None = None
        self._jobs: dict[str, Job] = {}
        self._positions: dict[str, int] = {}
        self._answers: dict[tuple[str, str], tuple[int, bytes]] = {}
        self._turned = asyncio.Event()
        self.read_at = 0.0

    def get(self, job_id: str) -> Job | None:
        """The job, unless it is unknown here: then the database may have it."""
        return self._jobs.get(job_id)

    def all(self) -> list[Job]:
        """Every job that is in memory."""
        return list(self._jobs.values())

    def position(self, job: Job) -> int:
        """How many jobs go before this one."""
        return self._positions.get(job.id, len(self._positions))

    def put(self, job: Job) -> None:
        """Take up what a request has just done, before the next reading."""
        known = self._jobs.get(job.id)
        if known is None or job.updated >= known.updated:
            self._take([job])

    def drop(self, job_id: str) -> None:
        """Forget a deleted job."""
        self._jobs.pop(job_id, None)

    def answer(self, job: Job, base: str) -> tuple[int, bytes] | None:
        """What ``keep_answer`` kept for a job and a client's address of the server."""
        return self._answers.get((job.id, base))

    def keep_answer(self, job: Job, base: str, answer: tuple[int, bytes]) -> None:
        """Until the next change of any job, and within bounds."""
        if len(self._answers) < 20_000:
            self._answers[job.id, base] = answer

    async def turned(self) -> None:
        """Wait for the next reading."""
        await self._turned.wait()

    async def refresh(self) -> None:
        """Read what has changed. Raises DatabaseAway."""
        changes, self._token = await asyncio.to_thread(self._store.changed_since, self._token)
        self._take(changes)
        self.read_at = time.time()
        turned, self._turned = self._turned, asyncio.Event()
        turned.set()

    async def keep_fresh(self) -> None:
        """Read for ever."""
        away = False
        while True:
            try:
                await self.refresh()
                away = False
            except DatabaseAway as failure:
                if not away:
                    log.warning("%s; answering as of the last reading", failure)
                away = True
            await asyncio.sleep(REFRESH_SECONDS)

    def _take(self, changes: list[Job]) -> None:
        old = time.time() - KEEP_SECONDS
        ended = [job.id for job in self._jobs.values() if job.is_finished and (job.finished or 0) < old]
        if not changes and not ended:
            return
        # Deleted ones are forgotten with those that ended long ago.
        gone = {*ended, *(job.id for job in changes if job.state == DELETED)}
        known = self._jobs | {job.id: job for job in changes}
        self._jobs = {job_id: job for job_id, job in known.items() if job_id not in gone}
        waiting = sorted((job.priority, job.number, job.id) for job in self._jobs.values() if job.state == QUEUED)
        self._positions = {job_id: place for place, (_, _, job_id) in enumerate(waiting)}
        self._answers = {}
