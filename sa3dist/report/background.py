"""The page of a run, written again at every save by another process, which the training never waits for."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from typing import TYPE_CHECKING

from sa3dist.report.recorder import record_start
from sa3dist.training.observers import Observation, Observer

if TYPE_CHECKING:
    from sa3dist.runtime.process_group import Group
    from sa3dist.runtime.signals import StopRequest
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)

# What the last page may take once all steps are done.
CLOSE_SECONDS = 20.0


def of_run(settings: Settings, group: Group, first_step: int) -> Observer | None:
    """The writer of the run's page; None where the settings ask for none. first_step: where this start continues."""
    return ReportWriter(settings, group, first_step) if settings.report else None


class ReportWriter(Observer):
    """On rank 0, after a save: starts ``sa3dist.report.process``, unless one is still at work."""

    name = "report"

    def __init__(self, settings: Settings, group: Group, first_step: int) -> None:
        self._settings, self._group, self._first_step = settings, group, first_step
        self._process: subprocess.Popen[str] | None = None
        # A save that no page shows yet, because the one before was still being written.
        self._waiting, self._saved, self._said = False, first_step, False

    def begin(self, stop: StopRequest) -> Observation | None:
        if self._group.is_main:
            with contextlib.suppress(OSError):
                where = self._group.device, self._group.world_size
                record_start(self._settings.output_dir, self._first_step, *where)

    def after_save(self, step: int) -> None:
        if self._group.is_main:
            self._saved, self._waiting = step, True
            self._start()

    def close(self) -> None:
        """Wait for the last page where all steps are done; otherwise leave the process its own time."""
        if not self._group.is_main or self._saved < self._settings.number_of_steps:
            return
        # Other ranks wait no longer than a step may take.
        seconds = min(CLOSE_SECONDS, self._settings.step_timeout / 2)
        while self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.terminate()
                self._say(f"it was not written within {seconds:g} s")
                return
            self._start()

    def _start(self) -> None:
        """Begin a page where one is due and none is being written; say why the one before failed."""
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
            # A session of its own: what ends this run's processes leaves it its last page.
            self._process = subprocess.Popen(
                command, **nothing, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
            )
        except OSError as failure:
            self._say(str(failure))

    def _say(self, reason: str) -> None:
        if not self._said:
            log.warning("report.html left out: %s; training goes on, sa3dist report writes it", reason)
        self._said = True
