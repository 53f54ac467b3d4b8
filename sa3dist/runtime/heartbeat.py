"""heartbeat.json: tells schedulers that the run makes progress; renewed only while rank 0 does."""

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
    """Step, stage, current work, time, host and process id; written atomically."""

    def __init__(self, output_dir: Path, liveness: Liveness) -> None:
        self._path = Path(output_dir) / HEARTBEAT_NAME
        self._liveness = liveness
        self._was_there = self._path.exists()
        # Progress count at the last write; None = no more writes.
        self._written: int | None = 0
        self._alone = threading.Lock()

    def renew(self) -> None:
        """Write if there was progress. Called repeatedly by the thread that keeps the directory's lock."""
        with self._alone:
            if self._written not in (None, self._liveness.progress_count):
                self._written = self._liveness.progress_count
                self._write(self._liveness.stage)

    def close(self, failure: BaseException | None) -> None:
        """Write how the run ended, then never again. A refused run leaves nothing but its status."""
        with self._alone:
            self._written = None
            code = exit_code_of(failure)
            if run_lock.is_anothers(self._path.parent):
                return
            if code != errors.EXIT_USER:
                self._write(STATES[code])
            elif not self._was_there:
                # output_dir may be a file; the run is refused for that.
                with contextlib.suppress(NotADirectoryError):
                    self._path.unlink(missing_ok=True)

    def _write(self, stage: str) -> None:
        said = {"step": self._liveness.step, "stage": stage, "doing": self._liveness.doing, "time": time.time()}
        try:
            write_json(self._path, said | {"host": socket.gethostname(), "pid": os.getpid()})
        except OSError as error:
            # Only a warning: code that needs the disk reports it itself.
            log.warning("%s: cannot write (%s)", self._path, error.strerror)
