"""A runner's thread for the database: renews the lease, publishes progress, notices a cancellation.

The database may be away for any time. The main thread, which must end the trainer in time, never waits for it.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sa3dist.runtime import lease
from sa3dist.serve.job import Job
from sa3dist.serve.leases import Leases
from sa3dist.serve.options import RunOptions
from sa3dist.serve.tables import DatabaseAway

LOOK_SECONDS = 0.5


class LeaseThread:
    """Holds one attempt's lease, from its creation. Creating it may raise DatabaseAway.

    deadline    time until which work may continue, on the clock of ``lease.seconds_now``
    lost        another attempt has begun, or the lease has ended: this attempt must end
    cancelled   cancellation of the job was requested
    """

    def __init__(self, leases: Leases, job: Job, options: RunOptions) -> None:
        self._leases, self._job, self._options = leases, job, options
        self._file: Path | None = None
        self._shown: dict[str, Any] = {}
        self._published: dict[str, Any] = {}
        self._ended = threading.Event()
        self._renewed_at = 0.0
        self.deadline = 0.0
        self.cancelled = False
        self.lost = False
        self._renew()
        if not self.lost:
            threading.Thread(target=self._run, name="lease", daemon=True).start()

    def write_to(self, file: Path) -> None:
        """From now on, also write the deadline to ``file``, for the trainer."""
        lease.write(file, self.deadline)
        self._file = file

    def show(self, values: dict[str, Any]) -> None:
        """Publish these values of the job soon."""
        self._shown = values

    @property
    def over(self) -> bool:
        """Whether this attempt must stop working."""
        return self.lost or lease.seconds_now() > self.deadline

    def close(self) -> None:
        self._ended.set()

    def finish(self, end: Callable[[], bool]) -> bool:
        """Call ``end`` until the database answers; returns whether this attempt was still the current one."""
        while True:
            try:
                return end()
            except DatabaseAway:
                time.sleep(LOOK_SECONDS)

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS) and not self.lost:
            try:
                if lease.seconds_now() - self._renewed_at >= self._options.renew_seconds:
                    self._renew()
                self._exchange()
            except (DatabaseAway, OSError):
                # Try again, until the deadline has passed.
                continue

    def _renew(self) -> None:
        # The time before the request, so that the deadline is earlier than the lease's end in the database.
        before = lease.seconds_now()
        if not self._leases.renew(self._job, self._options.lease_seconds):
            self.lost = True
            return
        self._renewed_at = before
        self.deadline = before + self._options.lease_seconds - self._options.margin_seconds
        if self._file is not None:
            lease.write(self._file, self.deadline)

    def _exchange(self) -> None:
        shown = self._shown
        if shown != self._published:
            self.lost = self.lost or not self._leases.publish(self._job, **shown)
            self._published = shown
        cancelled = self._leases.cancelled(self._job)
        self.lost = self.lost or cancelled is None
        self.cancelled = bool(cancelled)
