"""The page of a run, rewritten at every save by another process that the training never waits for."""

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

# Seconds until the last page must be there, after the last step and after an interruption. A page not written by then
# is given up, or left to its process.
LAST_PAGE_SECONDS = 20.0
EARLY_PAGE_SECONDS = 3.0
# The last page gets at least this long.
LEAST_SECONDS = 1.0
POLL_SECONDS = 0.02


def of_run(settings: Settings, group: Group, first_step: int) -> Observer | None:
    """The writer of the run's page; None if the settings ask for none. first_step: where this start continues."""
    return ReportWriter(settings, group, first_step) if settings.report else None


class ReportWriter(Observer):
    """On rank 0, after a save: starts ``sa3dist.report.process``, unless one is still running.

    The last page is begun once the run has reported how it ended, and is waited for.
    """

    name = "report"

    def __init__(self, settings: Settings, group: Group, first_step: int) -> None:
        self._settings, self._group, self._first_step = settings, group, first_step
        self._process: subprocess.Popen[str] | None = None
        # A save happened while the page of an earlier one was being written: another page is due.
        self._waiting = self._said = False
        self._early, self._until = True, 0.0
        self._stop: StopRequest | None = None

    def begin(self, stop: StopRequest) -> Observation | None:
        self._stop = stop
        if self._group.is_main:
            with contextlib.suppress(OSError):
                record_start(self._settings.output_dir, self._first_step, self._group.device, self._group.world_size)

    def after_save(self, step: int, last: bool) -> None:
        if self._group.is_main and not last:
            self._waiting = True
            self._start()

    def finish(self, early: bool) -> None:
        self._early = early
        self._until = time.monotonic() + (EARLY_PAGE_SECONDS if early else LAST_PAGE_SECONDS)

    def on_exit(self) -> None:
        """Write the last page, which says how the run ended."""
        if not self._group.is_main:
            return
        # Otherwise an earlier page could replace the last one.
        self._give_up()
        self._waiting = True
        self._start()
        begin = time.monotonic()
        until = max(begin + LEAST_SECONDS, self._until)
        while self._process is not None and self._process.poll() is None:
            if time.monotonic() > until or (not self._early and self._stop is not None and self._stop.requested()):
                break
            time.sleep(POLL_SECONDS)
        # Call once more, to log why it failed.
        self._start()
        if self._process is not None and not self._early:
            self._give_up()
            self._say(f"it was not written within {time.monotonic() - begin:.1f} s")

    def _give_up(self) -> None:
        """End the process of a page that is being written."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.communicate(timeout=LEAST_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
            self._process = None

    def _start(self) -> None:
        """Begin a page if one is due and none is being written; log why the last one failed."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            reason = self._process.stderr.read().strip()
            self._process.stderr.close()
            if self._process.returncode:
                self._say(reason.splitlines()[-1] if reason else f"exit code {self._process.returncode}")
            self._process = None
        if not self._waiting:
            return
        self._waiting = False
        command = [
            sys.executable,
            "-m",
            "sa3dist.report.process",
            self._settings.output_dir,
            self._settings.report_audio,
        ]
        nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        try:
            # A session of its own, so that whatever ends this run's processes does not end the last page.
            self._process = subprocess.Popen(
                command, **nothing, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
            )
        except OSError as failure:
            self._say(str(failure))

    def _say(self, reason: str) -> None:
        if not self._said:
            log.warning("report.html left out: %s; training goes on, sa3dist report writes it", reason)
        self._said = True
