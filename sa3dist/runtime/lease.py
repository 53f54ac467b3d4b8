"""The lease of a run that a job queue has started: a file with the time by which the run must have ended itself.

The process that started the run renews the file. If that process is gone, stopped, or has lost its claim on the run,
the time passes, and another run of the same job may begin. This run must not work beside it.
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
    """The clock of leases: seconds since the machine's start, sleep included; independent of the time of day."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def write(path: Path, deadline: float) -> None:
    """Let the run continue until ``deadline``, on the clock of ``seconds_now``."""
    write_whole(path, f"{deadline!r}\n")


def watch() -> None:
    """From now on, end this process when its lease ends. Does nothing without a lease."""
    if VARIABLE in os.environ:
        end_if_over()
        threading.Thread(target=_watch, name="lease", daemon=True).start()


def end_if_over() -> None:
    """End this process and its process group at once if its lease is over. Also called before anything is published."""
    global _deadline
    if VARIABLE not in os.environ:
        return
    # If the file cannot be read, its last known deadline holds.
    with contextlib.suppress(OSError, ValueError):
        _deadline = float(Path(os.environ[VARIABLE]).read_text(encoding="ascii"))
    if seconds_now() > _deadline:
        # Save and report nothing: another run may have taken over.
        os.killpg(0, signal.SIGKILL)


def _watch() -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        end_if_over()
