"""heartbeat.json: the sign of life for schedulers, renewed while rank 0 gets on, and only then."""

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
from sa3dist.runtime.exit_status import HEARTBEAT_NAME, STATES, exit_code_of
from sa3dist.runtime.liveness import Liveness

log = logging.getLogger(__name__)


class HeartbeatFile:
    """Step, stage, what is being done, time, host and process id, written whole or not at all."""

    def __init__(self, output_dir: Path, liveness: Liveness) -> None:
        self._path = Path(output_dir) / HEARTBEAT_NAME
        self._liveness = liveness
        self._was_there = self._path.exists()
        # Of the last writing; None when there will be no more.
        self._written: int | None = 0
        self._alone = threading.Lock()

    def renew(self) -> None:
        """Write if there was progress. Called now and then by the thread that keeps the directory's lock."""
        with self._alone:
            if self._written not in (None, self._liveness.progress_count):
                self._written = self._liveness.progress_count
                self._write(self._liveness.stage)

    def close(self, failure: BaseException | None) -> None:
        """Write how the run ended, and no more. A refused run leaves nothing but its status."""
        with self._alone:
            self._written = None
            code = exit_code_of(failure)
            if run_lock.is_anothers(self._path.parent):
                return
            if code != errors.EXIT_USER:
                self._write(STATES[code])
            elif not self._was_there:
                # An output_dir that is a file is what the run was refused for.
                with contextlib.suppress(NotADirectoryError):
                    self._path.unlink(missing_ok=True)

    def _write(self, stage: str) -> None:
        said = {"step": self._liveness.step, "stage": stage, "doing": self._liveness.doing, "time": time.time()}
        try:
            write_json(self._path, said | {"host": socket.gethostname(), "pid": os.getpid()})
        except OSError as error:
            # What needs the disk will say so itself.
            log.warning("%s: cannot write (%s)", self._path, error.strerror)
