"""The process that runs one attempt at a job: holds its lease, starts and ends its trainer, records the outcome.

The scheduler starts it, and it outlives the scheduler. Its mark names the attempt. It reads database and options from
stdin: addresses may contain passwords.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sa3dist.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_INTERRUPTED, EXIT_USER, EnvironmentFailure, SA3DistError
from sa3dist.serve import attempts
from sa3dist.serve.executor import Attempt, Executor
from sa3dist.serve.executors import open_executor
from sa3dist.serve.job import Job
from sa3dist.serve.job_store import JobStore
from sa3dist.serve.lease_thread import LeaseThread
from sa3dist.serve.leases import Leases
from sa3dist.serve.local_executor import LEASE_NAME
from sa3dist.serve.logs import Logs, public, public_names
from sa3dist.serve.options import RunOptions
from sa3dist.serve.processes import MARK, Mark, end_marked, take_lock
from sa3dist.serve.tables import RUNNING

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
SHOW_SECONDS = 0.5


class Lost(Exception):
    """This process no longer holds the attempt's lease."""


class Runner:
    """Runs one attempt. mark: this process's own mark."""

    def __init__(self, store: JobStore, job: Job, options: RunOptions, mark: Mark) -> None:
        self._store, self._job, self._options, self._mark = store, job, options, mark
        self._leases = Leases(store)
        self._executor: Executor = open_executor(options)
        self._folder = job.attempt_folder
        self._run = self._folder / attempts.RUN_NAME
        self._log = self._folder / attempts.LOG_NAME
        self._public_names = public_names(job, options.work_dir, options.models)
        self._asked_to_stop = False
        self._stopped_at: float | None = None
        self._last_problem = ""

    def run(self) -> None:
        """Run the attempt to its end. Raises DatabaseAway if the database is away before anything began."""
        signal.signal(signal.SIGTERM, self._handle_sigterm)
        self._lease = LeaseThread(self._leases, self._job, self._options)
        if self._lease.lost:
            # Started too late, for example because the host was suspended.
            return
        try:
            self._executor.start(self._begin())
            code = self._watch()
        except Lost:
            self._end_trainer()
            # If only the database was away, the lease is still ours: queue the job now, before the lease ends.
            ended = self._lease.finish(lambda: self._leases.try_again(self._job, LOST_CONTACT, None, counts=False))
            log.info("lost the lease; %s", "queued again" if ended else "another attempt has it")
        except (OSError, EnvironmentFailure) as problem:
            self._end_trainer()
            error = {"detail": str(problem), "error_type": "runner_scheduling_failure"}
            self._lease.finish(lambda: self._leases.try_again(self._job, error, EXIT_ENVIRONMENT, counts=True))
        else:
            # End remaining processes before the end of the job is visible.
            self._end_trainer()
            self._publish(code)
        finally:
            self._lease.close()

    def _handle_sigterm(self, number: int, frame: Any) -> None:
        self._asked_to_stop = True

    def _check_lease(self) -> None:
        if self._lease.over:
            raise Lost

    def _begin(self) -> Attempt:
        """Take the locks, killing processes of older attempts that hold them, and prepare the folder."""
        mine, gpus = self._mark, set(self._mark.devices)
        locks = Path(mine.locks)

        def is_older(mark: Mark) -> bool:
            return mark.is_of(mine) and mark.job == mine.job and mark.fence < mine.fence

        def is_on_my_gpu(mark: Mark) -> bool:
            # The queue gives a GPU to one job at a time, so another job's process on it is stale.
            return mark.is_of(mine) and mark.job != mine.job and bool(gpus & set(mark.devices))

        end_marked(is_older, self._check_lease)
        job_lock = locks / f"job-{mine.job}"
        handles = [take_lock(job_lock, lambda: end_marked(is_older, self._check_lease), self._check_lease)]
        for device in sorted(gpus):
            self._lease.show({"stage": f"waiting for GPU {device}"})
            lock = locks / f"gpu-{device}"
            handles.append(take_lock(lock, lambda: end_marked(is_on_my_gpu, self._check_lease), self._check_lease))
        settings = self._settings()
        attempts.share_work_of_base(Path(settings["work_dir"]), Path(self._options.work_dir))
        request = attempts.prepare(self._job, settings, self._folder)
        self._check_lease()
        self._lease.write_to(self._folder / LEASE_NAME)
        options = self._options
        processes = len(gpus) or (1 if options.executor == "local" else options.devices_per_job)
        self._logs = Logs(self._log, self._job.folder, self._public_names)
        return Attempt(
            self._job, self._folder, self._run, request, self._log, processes, options.nodes, mine, tuple(handles)
        )

    def _settings(self) -> dict[str, Any]:
        job, options = self._job, self._options
        values = {**options.settings, **job.request}
        name = values.get("model", "medium-base")
        if isinstance(name, str) and name in options.models:
            values["model"] = options.models[name]
        return {**values, "work_dir": options.work_dir, **job.settings}

    def _watch(self) -> int:
        """Wait for the trainer's exit code, publishing progress meanwhile. Raises Lost."""
        shown_at = alive_at = 0.0
        last_signs: Any = None
        while (code := self._try(self._executor.exit_code)) is None:
            self._check_lease()
            now = time.monotonic()
            if now - shown_at > SHOW_SECONDS:
                shown_at = now
                progress = attempts.progress(self._run)
                self._lease.show(progress)
                # Signs of life: log output, or a new heartbeat, which the trainer writes only when it makes progress.
                has_output = self._logs.move()
                signs = progress, attempts.read_json(self._run / attempts.HEARTBEAT_NAME).get("time")
                if has_output or signs != last_signs:
                    last_signs, alive_at = signs, now
                self._end_stalled(progress.get("stage"), now - alive_at)
            self._pass_on_stop(now)
            time.sleep(LOOK_SECONDS)
        while self._logs.move():
            pass
        return code

    def _pass_on_stop(self, now: float) -> None:
        if not (self._lease.cancelled or self._asked_to_stop):
            return
        if not self._lease.cancelled and self._executor.outlives_runner:
            # The trainer continues; the next runner finds it.
            raise Lost
        if self._stopped_at is None:
            self._stopped_at = now
            self._try(self._executor.ask_to_stop)
        elif now - self._stopped_at > self._options.stop_seconds:
            self._try(self._executor.kill)

    def _try(self, call: Callable[[], Any]) -> Any:
        """The result of ``call``; None, with one warning, if a cluster's scheduler does not answer."""
        try:
            return call()
        except EnvironmentFailure as problem:
            if str(problem) != self._last_problem:
                log.warning("%s", problem)
            self._last_problem = str(problem)
            return None

    def _end_stalled(self, stage: str | None, seconds: float) -> None:
        options = self._options
        limit = options.stall_seconds if stage == "train" else options.preparation_stall_seconds
        # A cluster's job may wait for any time, and its scheduler has limits of its own.
        if options.executor == "local" and seconds > limit:
            log.warning("no sign of progress for %.0f s, ending the trainer", seconds)
            self._executor.kill()

    def _end_trainer(self) -> None:
        """Kill the trainer and wait until all its processes have ended, so that its GPUs are free."""
        # A trainer that outlives its runner has ended, or the next runner finds it.
        while not self._executor.outlives_runner and not self._executor.kill():
            time.sleep(LOOK_SECONDS)

    def _publish(self, code: int) -> None:
        """Record in the database how the attempt ended."""
        job, leases = self._job, self._leases

        def finish(end: Callable[[], bool], is_last: bool = True) -> bool:
            ended = self._lease.finish(end)
            if ended and is_last:
                # No further attempt will need the lock file.
                (Path(self._mark.locks) / f"job-{job.id}").unlink(missing_ok=True)
            return ended

        text = public(attempts.message(self._run, self._log), self._public_names)
        result = attempts.result(job, self._run) if code == EXIT_DONE else None
        if result is not None:
            if finish(lambda: leases.succeed(job, result)):
                attempts.remove_others(job, self._folder)
        elif self._lease.cancelled:
            finish(lambda: leases.cancel(job, code))
        elif code == EXIT_INTERRUPTED:
            finish(lambda: leases.try_again(job, attempts.failure(job, code, text), code, counts=False), False)
        elif code == EXIT_ENVIRONMENT or code < 0 or code > 128:
            # If the machine goes down, the failure is not the job's fault.
            counts = not self._asked_to_stop
            finish(lambda: leases.try_again(job, attempts.failure(job, code, text), code, counts), False)
        else:
            finish(lambda: leases.fail(job, attempts.failure(job, code, text), code))
        log.info("ended with %s", f"{code}: {text}" if code != EXIT_USER else code)


LOST_CONTACT = {"detail": "The database was out of reach for too long", "error_type": "runner_disconnected"}


def main() -> NoReturn:
    """Run the attempt that its mark names; see ``scheduler.start_runner``."""
    logging.basicConfig(format="%(asctime)s runner: %(message)s", stream=sys.stderr, level=logging.INFO)
    try:
        run(json.load(sys.stdin))
    except SA3DistError as problem:
        # The database is away and nothing was begun: the lease ends, and another attempt follows.
        log.warning("%s", problem)
    # _exit, because threads may be waiting for a database that does not answer.
    logging.shutdown()
    os._exit(0)


def run(config: dict[str, Any]) -> None:
    """Run the attempt, unless it is no longer the job's current one. Raises DatabaseAway if nothing was begun."""
    mark = Mark.of_json(json.loads(os.environ[MARK]))
    store = JobStore(config["database"], Path(mark.store))
    job = store.get(mark.job)
    if job is not None and (job.state, job.fence) == (RUNNING, mark.fence):
        Runner(store, job, RunOptions.of_json(config["options"]), mark).run()


if __name__ == "__main__":
    main()
