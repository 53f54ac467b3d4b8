"""Write a run's report at every save, in another process, so that training does not wait."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from sa3dist.report.recorder import record_start
from sa3dist.training.observers import Observation, Observer

if TYPE_CHECKING:
    from sa3dist.runtime.process_group import Group
    from sa3dist.runtime.signals import StopRequest
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)

# How long to wait for the last report after the last step. Then its process is ended.
LAST_PAGE_SECONDS = 20.0
# The same for an interrupted run. Then the process is left to finish alone.
EARLY_PAGE_SECONDS = 3.0
# Minimum of both waits.
LEAST_SECONDS = 1.0
POLL_SECONDS = 0.02


def of_run(settings: Settings, group: Group, first_step: int) -> Observer | None:
    """The run's report writer; None if its settings disable it. first_step: the step at which this start continues."""
    return ReportWriter(settings, group, first_step) if settings.report else None


class ReportWriter(Observer):
    """Starts ``sa3dist.report.process`` after each save, on rank 0, unless one is still running.

    The last report is started once the run's final status is written; the run waits for it.
    """

    name = "report"

    def __init__(self, settings: Settings, group: Group, first_step: int) -> None:
        self._settings, self._group, self._first_step = settings, group, first_step
        self._process: subprocess.Popen[str] | None = None
        # Whether a save is not yet in any report, because the previous report was still being written.
        self._pending = self._warned = False
        self._early, self._until = True, 0.0
        self._stop: StopRequest | None = None

    def begin(self, stop: StopRequest) -> Observation | None:
        self._stop = stop
        if self._group.is_main:
            with contextlib.suppress(OSError):
                record_start(self._settings.output_dir, self._first_step, self._group.device, self._group.world_size)

    def after_save(self, step: int, last: bool) -> None:
        if self._group.is_main and not last:
            self._pending = True
            self._start()

    def finish(self, early: bool) -> None:
        self._early = early
        self._until = time.monotonic() + (EARLY_PAGE_SECONDS if early else LAST_PAGE_SECONDS)

    def on_exit(self) -> None:
        """Write the last report, which says how the run ended."""
        if not self._group.is_main:
            return
        # A report in progress could overwrite this one.
        self._end_process()
        self._pending = True
        self._start()
        begin = time.monotonic()
        until = max(begin + LEAST_SECONDS, self._until)
        while self._process is not None and self._process.poll() is None:
            if time.monotonic() > until or (not self._early and self._stop is not None and self._stop.requested()):
                break
            time.sleep(POLL_SECONDS)
        # Logs why it failed, if it did.
        self._start()
        if self._process is not None and not self._early:
            self._end_process()
            self._warn(f"it was not written within {time.monotonic() - begin:.1f} s")

    def _end_process(self) -> None:
        """End a running report process."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.communicate(timeout=LEAST_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
            self._process = None

    def _start(self) -> None:
        """Start a report process if one is pending and none is running; log why the previous one failed."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            reason = self._process.stderr.read().strip()
            self._process.stderr.close()
            if self._process.returncode:
                self._warn(reason.splitlines()[-1] if reason else f"exit code {self._process.returncode}")
            self._process = None
        if not self._pending:
            return
        self._pending = False
        command = [
            sys.executable,
            "-m",
            "sa3dist.report.process",
            self._settings.output_dir,
            self._settings.report_audio,
        ]
        closed = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        try:
            # In its own session, so that signals to this run's process group do not prevent the last report.
            self._process = subprocess.Popen(
                command, **closed, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
            )
        except OSError as failure:
            self._warn(str(failure))

    def _warn(self, reason: str) -> None:
        if not self._warned:
            log.warning("report.html left out: %s; training goes on, sa3dist report writes it", reason)
        self._warned = True
