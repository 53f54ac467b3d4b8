"""The loop of an endpoint that gives out its jobs: claims the next one and starts its shepherd.

Any number of servers run it at once. One that starts again has nothing to do for jobs that run: their shepherds do.
"""

import argparse
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from sa3dist.errors import SA3DistError
from sa3dist.serve.executors import open_executor
from sa3dist.serve.job import Job
from sa3dist.serve.jobs import JobStore
from sa3dist.serve.leases import Leases, Place
from sa3dist.serve.options import RunOptions, gpus_here, shared_work_dir
from sa3dist.serve.processes import Mark, locks_folder
from sa3dist.serve.tables import DatabaseAway

log = logging.getLogger(__name__)

TIDY_SECONDS = 3600.0
SHEPHERD_LOG = "shepherd.log"


class Scheduler:
    """Runs the jobs of ``store`` as ``options`` say. keep_days: finished jobs are deleted after; None: as they ask."""

    def __init__(self, store: JobStore, options: RunOptions, keep_days: float | None = None) -> None:
        self._store, self._options, self._keep_days = store, options, keep_days
        self._leases = Leases(store)
        self._place = Place(
            owner=f"{socket.gethostname()}:{os.getpid()}",
            host=options.host,
            executor=options.executor,
            devices=options.devices,
            # A slot is one job, however many GPUs a cluster gives it.
            devices_per_job=options.devices_per_job if options.gpus else 1,
            limit=options.limit,
            lease_seconds=options.lease_seconds,
        )
        self._shepherds: list[subprocess.Popen] = []
        self._tidied_at: float | None = None
        self._away = False
        # Refused here, once, rather than in every shepherd. Raises ConfigError, EnvironmentFailure.
        open_executor(options)
        Path(options.locks).mkdir(parents=True, exist_ok=True)

    def run(self, stop: threading.Event) -> None:
        """Give out jobs until ``stop`` is set; those that run go on after that."""
        while not stop.wait(self._options.poll_seconds):
            try:
                self.look()
                if self._away:
                    log.info("the database answers again")
                self._away = False
            except DatabaseAway as problem:
                if not self._away:
                    log.warning("%s; jobs that run go on until their leases end", problem)
                self._away = True

    def look(self) -> None:
        """One round: take back, claim, start. Raises DatabaseAway."""
        # One that has ended is nobody's zombie.
        self._shepherds = [shepherd for shepherd in self._shepherds if shepherd.poll() is None]
        self._leases.end_overdue()
        while (job := self._leases.claim(self._place)) is not None:
            self._shepherds.append(start_shepherd(self._store, job, self._options))
        if self._tidied_at is None or time.monotonic() - self._tidied_at > TIDY_SECONDS:
            self._tidied_at = time.monotonic()
            self._store.retention(self._keep_days)
            self._store.sweep()

    def stop_jobs(self) -> None:
        """End the jobs started here: they save, and are queued again. For a machine or container that goes down."""
        for shepherd in self._shepherds:
            shepherd.terminate()
        for shepherd in self._shepherds:
            shepherd.wait()


def start_shepherd(store: JobStore, job: Job, options: RunOptions) -> subprocess.Popen:
    """Start the process that runs a claimed job. If that comes to nothing, its lease ends and it is given out again."""
    job.folder.mkdir(parents=True, exist_ok=True)
    devices = tuple(job.devices or ()) if options.gpus else ()
    mark = Mark(options.locks, str(store.folder), job.id, job.fence, devices)
    told = {"database": store.url, "folder": str(store.folder), "job": job.id, "fence": job.fence}
    told |= {"options": options.as_json(), "mark": dataclasses.asdict(mark)}
    with (job.folder / SHEPHERD_LOG).open("ab") as said:
        shepherd = subprocess.Popen(
            [sys.executable, "-m", "sa3dist.serve.shepherd"],
            env=os.environ | mark.environment(),
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        shepherd.stdin.write(json.dumps(told).encode())
        shepherd.stdin.close()
    except BrokenPipeError:
        log.warning("job %s: its shepherd ended at once; see %s", job.id, job.folder / SHEPHERD_LOG)
    return shepherd


def main(argv: Sequence[str] | None = None) -> int:
    """Give out jobs without a web server: on a further host of the same database and folder."""
    parser = argparse.ArgumentParser(prog="python -m sa3dist.serve.scheduler", description=main.__doc__)
    parser.add_argument("--database", help="sqlite:///FILE or postgresql://...; unset = DATA/jobs.db")
    parser.add_argument("--data", required=True, type=Path, metavar="DATA", help="folder of all files")
    parser.add_argument("--options", default="{}", help="JSON: what RunOptions of sa3dist/serve/options.py hold")
    words = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s scheduler: %(message)s", stream=sys.stderr, level=logging.INFO)
    data = words.data.absolute()
    gpus = gpus_here()
    values = {
        "executor": "local",
        "devices": gpus or (0,),
        "gpus": bool(gpus),
        "work_dir": shared_work_dir(data),
        "host": socket.gethostname(),
        "options": (),
        **json.loads(words.options),
    }
    values.setdefault("locks", str(locks_folder()))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.set())
    try:
        store = JobStore(words.database or f"sqlite:///{data / 'jobs.db'}", data / "jobs")
        scheduler = Scheduler(store, RunOptions.of_json(values))
    except SA3DistError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    scheduler.run(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
