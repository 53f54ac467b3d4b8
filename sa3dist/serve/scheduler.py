"""The scheduler of an endpoint: claims waiting jobs and starts a runner process for each.

Any number of servers may run it at once. A restart does not affect running jobs: their runners continue.
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

from sa3dist.errors import EXIT_ENVIRONMENT, SA3DistError
from sa3dist.serve.executors import open_executor
from sa3dist.serve.job import Job
from sa3dist.serve.job_store import JobStore
from sa3dist.serve.leases import Leases
from sa3dist.serve.options import RunOptions, gpus_here, shared_work_dir
from sa3dist.serve.processes import Mark, locks_folder
from sa3dist.serve.tables import DatabaseAway

log = logging.getLogger(__name__)

CLEANUP_SECONDS = 60.0
RUNNER_LOG = "runner.log"


class Scheduler:
    """Starts the jobs of ``store``. keep_days: delete finished jobs after this time; None: as each requests."""

    def __init__(self, store: JobStore, options: RunOptions, keep_days: float | None = None) -> None:
        self._store, self._options, self._keep_days = store, options, keep_days
        self._leases = Leases(store)
        self._runners: list[subprocess.Popen] = []
        self._cleaned_at: float | None = None
        self._problem = ""
        # Check the executor once here, rather than in every runner. Raises ConfigError, EnvironmentFailure.
        open_executor(options)
        Path(options.locks).mkdir(parents=True, exist_ok=True)

    def run(self, stop: threading.Event) -> None:
        """Start jobs until ``stop`` is set, whatever fails meanwhile. Running jobs continue after that."""
        while not stop.wait(self._options.poll_seconds):
            try:
                self.run_once()
                if self._problem:
                    log.info("jobs are started again")
                self._problem = ""
            except Exception as problem:
                # Log it once. The server still accepts jobs, so their scheduler must not end.
                if str(problem) != self._problem:
                    trace = not isinstance(problem, DatabaseAway | OSError)
                    log.warning("%s; no jobs are started, running ones continue", problem, exc_info=trace)
                self._problem = str(problem)

    def run_once(self) -> None:
        """One round: end overdue jobs, claim, start. Raises DatabaseAway, and OSError if a runner cannot be started."""
        # poll() reaps runners that have ended.
        self._runners = [runner for runner in self._runners if runner.poll() is None]
        self._leases.end_overdue()
        while (job := self._leases.claim(self._options)) is not None:
            try:
                self._runners.append(start_runner(self._store, job, self._options))
            except OSError as problem:
                # The disk is full or read-only, or memory is short: the job waits until that has passed.
                error = {"detail": str(problem), "error_type": "runner_scheduling_failure"}
                self._leases.try_again(job, error, EXIT_ENVIRONMENT, counts=False)
                raise
        if self._cleaned_at is None or time.monotonic() - self._cleaned_at > CLEANUP_SECONDS:
            self._cleaned_at = time.monotonic()
            self._store.delete_expired(self._keep_days)
            self._store.sweep()

    def stop_jobs(self) -> None:
        """Stop the jobs started here: they save and are queued again. For a machine or container that shuts down."""
        for runner in self._runners:
            runner.terminate()
        for runner in self._runners:
            runner.wait()


def start_runner(store: JobStore, job: Job, options: RunOptions) -> subprocess.Popen:
    """Start the process that runs a claimed job. If it fails, the lease ends and the job is claimed again."""
    job.folder.mkdir(parents=True, exist_ok=True)
    devices = tuple(job.devices or ()) if options.gpus else ()
    mark = Mark(options.locks, str(store.folder), job.id, job.fence, devices)
    config = {"database": store.url, "options": dataclasses.asdict(options)}
    with (job.folder / RUNNER_LOG).open("ab") as output:
        runner = subprocess.Popen(
            [sys.executable, "-m", "sa3dist.serve.runner"],
            env=os.environ | mark.environment(),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        runner.stdin.write(json.dumps(config).encode())
        runner.stdin.close()
    except BrokenPipeError:
        log.warning("job %s: its runner ended at once; see %s", job.id, job.folder / RUNNER_LOG)
    return runner


def main(argv: Sequence[str] | None = None) -> int:
    """Run a scheduler without a web server, on another host with the same database and folder."""
    parser = argparse.ArgumentParser(prog="python -m sa3dist.serve.scheduler", description=main.__doc__)
    parser.add_argument("--database", help="sqlite:///FILE or postgresql://...; unset = DATA/jobs.db")
    parser.add_argument("--data", required=True, type=Path, metavar="DATA", help="folder of all files")
    parser.add_argument("--options", default="{}", help="JSON: fields of RunOptions in sa3dist/serve/options.py")
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
