"""The process that runs one attempt at a job: holds its lease, starts and ends its trainer, publishes how it went.

Started by the scheduler, which it outlives. It is told its job on stdin: an address may hold a password.
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
from sa3dist.serve.jobs import JobStore
from sa3dist.serve.keeper import Keeper
from sa3dist.serve.leases import Leases
from sa3dist.serve.local_executor import LEASE_NAME
from sa3dist.serve.logs import Logs, public, public_names
from sa3dist.serve.options import RunOptions
from sa3dist.serve.processes import Mark, end_marked, take_lock
from sa3dist.serve.tables import RUNNING

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
SHOW_SECONDS = 0.5


class Lost(Exception):
    """The attempt is no longer this process's."""


class Shepherd:
    """One attempt. mark: what this process itself was started with."""

    def __init__(self, store: JobStore, job: Job, options: RunOptions, mark: Mark) -> None:
        self._store, self._job, self._options, self._mark = store, job, options, mark
        self._leases = Leases(store)
        self._executor: Executor = open_executor(options)
        self._folder = job.attempt_folder
        self._run = self._folder / attempts.RUN_NAME
        self._log = self._folder / attempts.LOG_NAME
        self._asked_to_stop = False
        self._stop_at: float | None = None
        self._problem = ""

    def run(self) -> None:
        """From the first renewal of the lease to the end of the attempt. Raises DatabaseAway before anything began."""
        signal.signal(signal.SIGTERM, self._hear)
        self._keeper = Keeper(self._leases, self._job, self._options)
        if self._keeper.lost:
            # A late start, of a server that was stopped meanwhile.
            return
        try:
            self._executor.start(self._begin())
            code = self._watch()
        except Lost:
            self._end_trainer()
            # With a dead database the lease is not lost yet: then the job need not wait for its end.
            ended = self._keeper.finish(lambda: self._leases.try_again(self._job, LOST_CONTACT, None, counts=False))
            log.info("lost the lease; %s", "queued again" if ended else "another attempt has it")
        except (OSError, EnvironmentFailure) as problem:
            self._end_trainer()
            error = {"detail": str(problem), "error_type": "runner_scheduling_failure"}
            self._keeper.finish(lambda: self._leases.try_again(self._job, error, EXIT_ENVIRONMENT, counts=True))
        else:
            # Whatever it has left behind ends before anybody hears of the end.
            self._end_trainer()
            self._publish(code)
        finally:
            self._keeper.close()

    def _hear(self, number: int, frame: Any) -> None:
        self._asked_to_stop = True

    def _check(self) -> None:
        if self._keeper.over:
            raise Lost

    def _begin(self) -> Attempt:
        """Take the locks, ending what older attempts have left under them, and make the folder."""
        mine, gpus = self._mark, set(self._mark.devices)
        locks = Path(mine.locks)

        def is_older(mark: Mark) -> bool:
            return mark.is_of(mine) and mark.job == mine.job and mark.fence < mine.fence

        def is_on_my_gpu(mark: Mark) -> bool:
            # The queue gives a GPU to one job at a time: what another one has left there is stale.
            return mark.is_of(mine) and mark.job != mine.job and bool(gpus & set(mark.devices))

        end_marked(is_older, self._check)
        handles = [take_lock(locks / f"job-{mine.job}", lambda: end_marked(is_older, self._check), self._check)]
        for device in sorted(gpus):
            self._keeper.show({"stage": f"waiting for GPU {device}"})
            lock = locks / f"gpu-{device}"
            handles.append(take_lock(lock, lambda: end_marked(is_on_my_gpu, self._check), self._check))
        settings = self._settings()
        attempts.share_work_of_base(Path(settings["work_dir"]), Path(self._options.work_dir))
        request = attempts.prepare(self._job, settings, self._folder)
        self._check()
        self._keeper.write_to(self._folder / LEASE_NAME)
        options = self._options
        processes = len(gpus) or (1 if options.executor == "local" else options.devices_per_job)
        self._logs = Logs(self._log, self._job.folder, self._public_names())
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

    def _public_names(self) -> dict[str, str]:
        return public_names(self._job, self._options.work_dir, self._options.models)

    def _watch(self) -> int:
        """The trainer's exit code. Raises Lost."""
        shown_at = alive_at = 0.0
        seen: Any = None
        while (code := self._answered(self._executor.exit_code)) is None:
            self._check()
            now = time.monotonic()
            if now - shown_at > SHOW_SECONDS:
                shown_at = now
                said = attempts.progress(self._run)
                self._keeper.show(said)
                # A heartbeat is renewed with progress alone; what is written to the log counts as well.
                signs = (self._logs.move(), said, attempts.read_json(self._run / attempts.HEARTBEAT_NAME).get("time"))
                if signs[0] or signs[1:] != seen:
                    seen, alive_at = signs[1:], now
                self._end_stalled(said.get("stage"), now - alive_at)
            self._pass_on_stop(now)
            time.sleep(LOOK_SECONDS)
        while self._logs.move():
            pass
        return code

    def _pass_on_stop(self, now: float) -> None:
        if not (self._keeper.cancelled or self._asked_to_stop):
            return
        if not self._keeper.cancelled and self._executor.outlives_shepherd:
            # The next shepherd finds it.
            raise Lost
        if self._stop_at is None:
            self._stop_at = now
            self._answered(self._executor.ask_to_stop)
        elif now - self._stop_at > self._options.stop_seconds:
            self._answered(self._executor.kill)

    def _answered(self, ask: Callable[[], Any]) -> Any:
        """None where a cluster's scheduler does not answer: it is asked again."""
        try:
            return ask()
        except EnvironmentFailure as problem:
            if str(problem) != self._problem:
                log.warning("%s", problem)
            self._problem = str(problem)
            return None

    def _end_stalled(self, stage: str | None, seconds: float) -> None:
        options = self._options
        limit = options.stall_seconds if stage == "train" else options.preparation_stall_seconds
        # On a cluster a job may wait for any time; there its scheduler has limits.
        if options.executor == "local" and seconds > limit:
            log.warning("no sign of progress for %.0f s, ending the trainer", seconds)
            self._executor.kill()

    def _end_trainer(self) -> None:
        """Return when nothing of the trainer runs any more: its GPU is free only then."""
        # On a cluster it has ended, or the next shepherd finds it.
        while not self._executor.outlives_shepherd and not self._executor.kill():
            time.sleep(LOOK_SECONDS)

    def _publish(self, code: int) -> None:
        """Tell the database how the attempt ended: once, under its number."""
        job, leases = self._job, self._leases

        def finish(end: Callable[[], bool], is_last: bool = True) -> bool:
            ended = self._keeper.finish(end)
            if ended and is_last:
                # No attempt follows that would ask for it.
                (Path(self._mark.locks) / f"job-{job.id}").unlink(missing_ok=True)
            return ended

        text = public(attempts.message(self._run, self._log), self._public_names())
        result = attempts.result(job, self._run) if code == EXIT_DONE else None
        if result is not None:
            if finish(lambda: leases.succeed(job, result)):
                attempts.remove_others(job, self._folder)
        elif self._keeper.cancelled:
            finish(lambda: leases.cancel(job, code))
        elif code == EXIT_INTERRUPTED:
            finish(lambda: leases.try_again(job, attempts.failure(job, code, text), code, counts=False), False)
        elif code == EXIT_ENVIRONMENT or code < 0 or code > 128:
            # Of a machine that goes down it is not the job's fault.
            counts = not self._asked_to_stop
            finish(lambda: leases.try_again(job, attempts.failure(job, code, text), code, counts), False)
        else:
            finish(lambda: leases.fail(job, attempts.failure(job, code, text), code))
        log.info("ended with %s", f"{code}: {text}" if code != EXIT_USER else code)


LOST_CONTACT = {"detail": "The database was out of reach for too long", "error_type": "runner_disconnected"}


def main() -> NoReturn:
    """Run the attempt that stdin tells of; see ``scheduler.start_shepherd``."""
    logging.basicConfig(format="%(asctime)s shepherd: %(message)s", stream=sys.stderr, level=logging.INFO)
    try:
        run(json.load(sys.stdin))
    except SA3DistError as problem:
        # Nothing was begun, with the database away: the lease ends, and another attempt follows.
        log.warning("%s", problem)
    # Threads may wait for a database that does not answer.
    logging.shutdown()
    os._exit(0)


def run(told: dict[str, Any]) -> None:
    """Run the attempt, unless its job has gone on without it. Raises DatabaseAway where nothing was begun."""
    store = JobStore(told["database"], Path(told["folder"]))
    job = store.get(told["job"])
    if job is not None and (job.state, job.fence) == (RUNNING, told["fence"]):
        Shepherd(store, job, RunOptions.of_json(told["options"]), Mark.of_json(told["mark"])).run()


if __name__ == "__main__":
    main()
