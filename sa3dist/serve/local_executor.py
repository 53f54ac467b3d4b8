"""Runs the trainer as processes of this host, in their own session, which hold their runner's locks."""

import contextlib
import os
import signal
import subprocess
import sys

import psutil

from sa3dist.runtime import lease
from sa3dist.runtime.launch_files import launch_file
from sa3dist.serve.executor import Attempt
from sa3dist.serve.processes import marked

LEASE_NAME = "lease"


class Local:
    """Starts launch/local.sh: one process per GPU, or one on the CPU."""

    outlives_runner = False

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None
        self._attempt: Attempt | None = None

    def start(self, attempt: Attempt) -> None:
        devices = attempt.mark.devices
        environment = os.environ | attempt.mark.environment() | {"SA3DIST_PYTHON": sys.executable}
        environment[lease.VARIABLE] = str(attempt.folder / LEASE_NAME)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        command = ["bash", str(launch_file("local.sh")), "-n", str(attempt.processes), *([] if devices else ["--cpu"])]
        with attempt.log.open("ab") as log:
            self._child = subprocess.Popen(
                [*command, str(attempt.request)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=attempt.handles,
            )
        self._attempt = attempt

    def exit_code(self) -> int | None:
        return self._child.poll()

    def ask_to_stop(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> bool:
        if self._attempt is None:
            return True
        self._send(signal.SIGKILL)
        # Ranks started by a launch agent have sessions of their own, so find them by their mark.
        remaining = marked(lambda mark: mark == self._attempt.mark)
        for process in remaining:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return not remaining

    def _send(self, number: int) -> None:
        # After it was waited for, its process id may belong to another process.
        if self._child.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)
