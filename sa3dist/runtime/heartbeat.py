"""heartbeat.json: the sign of life for schedulers, renewed while rank 0 gets on, and only then."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from pathlib import Path

from sa3dist import errors
from sa3dist.formats import write_json
from sa3dist.runtime import run_lock
from sa3dist.runtime.exit_status import HEARTBEAT_NAME, STATES, translate
from sa3dist.runtime.liveness import Liveness

log = logging.getLogger(__name__)

RENEWAL_SECONDS = 3.0


class HeartbeatFile:
    """Step, stage, what is being done, time, host and process id, written whole or not at all."""

    def __init__(self, output_dir: Path, liveness: Liveness) -> None:
        self._path = Path(output_dir) / HEARTBEAT_NAME
        self._liveness = liveness
        self._was_there = self._path.exists()

    def keep(self, ended: threading.Event) -> None:
        """Write now and then until ``ended``, when there was progress. Runs in a thread of its own."""
        written = None
        while not ended.wait(RENEWAL_SECONDS):
            now = self._liveness.progress_count
            if now != written:
                self._write(self._liveness.stage)
                written = now

    def close(self, failure: BaseException | None) -> None:
        """The last word: how the run ended. A refused run leaves nothing but its status."""
        if run_lock.is_anothers(self._path.parent):
            return
        explained = None if failure is None else translate(failure)
        code = errors.EXIT_DONE if failure is None else errors.EXIT_BUG if explained is None else explained.exit_code
        if code != errors.EXIT_USER:
            self._write(STATES[code])
        elif not self._was_there:
            # An output_dir that is a file is what the run was refused for.
            with contextlib.suppress(NotADirectoryError):
                self._path.unlink(missing_ok=True)

    def _write(self, stage: str) -> None:
        liveness = self._liveness
        if run_lock.is_anothers(self._path.parent):
            return
        said = {"step": liveness.step, "stage": stage, "doing": liveness.doing, "time": time.time()}
        try:
            write_json(self._path, said | {"host": socket.gethostname(), "pid": os.getpid()})
        except OSError as error:
            # What needs the disk will say so itself.
            log.warning("%s: cannot write (%s)", self._path, error.strerror)
