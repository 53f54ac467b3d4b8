"""The lease of a run that a job queue has started: a file with the moment by which the run must have ended itself.

Who started the run renews the file. When that process is gone, stopped, or has lost its own claim on the run, the file
stands still, the moment passes, and another run of the same job may begin: this one must not work beside it.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from sa3dist.formats import write_whole

VARIABLE = "SA3DIST_LEASE_FILE"
LOOK_SECONDS = 0.25

_deadline = 0.0


def seconds_now() -> float:
    """The clock of leases: since the machine's start, sleep included, whatever the time of day is set to."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def write(path: Path, deadline: float) -> None:
    """Let the run go on until ``deadline``, on the clock of ``seconds_now``."""
    write_whole(path, f"{deadline!r}\n")


def watch() -> None:
    """End this process when its lease does, from here to its end. Without effect where there is none."""
    if VARIABLE in os.environ:
        end_if_over()
        threading.Thread(target=_watch, name="lease", daemon=True).start()


def end_if_over() -> None:
    """End this process, and its group, at once when its lease is over. Called before anything is published, too."""
    global _deadline
    if VARIABLE not in os.environ:
        return
    # Out of reach: what it last said holds.
    with contextlib.suppress(OSError, ValueError):
        _deadline = float(Path(os.environ[VARIABLE]).read_text(encoding="ascii"))
    if seconds_now() > _deadline:
        # Nothing is saved or said: that would be work beside the run that may have taken over.
        os.killpg(0, signal.SIGKILL)


def _watch() -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        end_if_over()
