"""The jobs in memory, read again twice a second: what clients ask for most is answered without the database."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Hashable

from fastapi import Response

from sa3dist.serve.job import Job
from sa3dist.serve.jobs import JobStore, Token
from sa3dist.serve.tables import DELETED, QUEUED, DatabaseAway

log = logging.getLogger(__name__)

REFRESH_SECONDS = 0.5
# Finished jobs stay so long: whoever waits for one asks within seconds. Later ones are read from the database.
KEEP_SECONDS = 600.0
# Addresses in an answer have the Host header that the client sent.
MOST_ANSWERS, LONGEST_ANSWER = 20_000, 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """An answer about a job of the key ``owner``."""

    owner: str
    code: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Snapshot:
    """Unfinished jobs and those that ended a short time ago, as the database had them half a second ago.

    One thread at a time changes it; everything is replaced, nothing is changed in place.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._token: Token | None = None
        self._jobs: dict[str, Job] = {}
        self._positions: dict[str, int] = {}
        self._answers: dict[tuple[str, Hashable], Ready] = {}
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
        self._answers = {}

    def answer(self, job_id: str, seen_as: Hashable) -> Ready | None:
        """What ``keep_answer`` kept for a job, for clients that reach the server in the same way."""
        return self._answers.get((job_id, seen_as))

    def keep_answer(self, job: Job, seen_as: Hashable, answer: Response) -> None:
        """Until the next change of any job, and within bounds."""
        fits = len(self._answers) < MOST_ANSWERS and len(answer.body) < LONGEST_ANSWER
        if fits and self._jobs.get(job.id) is job:
            self._answers[job.id, seen_as] = Ready(job.key, answer.status_code, answer.raw_headers, answer.body)

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
