"""Find and end processes of jobs on this host, by a mark in their environment; and locks that they hold.

A process id does not identify a process: it may have been reused. The mark is in the environment, which children
inherit. A lock is released when the last process that holds its file open ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from sa3dist.errors import ConfigError

MARK = "SA3DIST_JOB"
LOOK_SECONDS = 0.1
# How long a finished process may take to release a lock.
LINGER_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Mark:
    """Identifies the processes of one attempt; stored in their environment.

    locks         folder of the locks
    store         folder of the jobs; distinguishes endpoints on one host
    job, fence    id of the job, and number of the attempt
    devices       numbers of the GPUs; empty if the devices are slots
    """

    locks: str
    store: str
    job: str
    fence: int
    devices: tuple[int, ...]

    def environment(self) -> dict[str, str]:
        return {MARK: json.dumps(dataclasses.asdict(self))}

    def is_of(self, other: Mark) -> bool:
        """Whether both belong to the same store on the same host."""
        return (self.locks, self.store) == (other.locks, other.store)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Mark:
        return cls(**values | {"devices": tuple(values["devices"])})


def _read(text: str) -> Mark | None:
    # The variable may have any value.
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return Mark.of_json(json.loads(text))
    return None


def marked(condition: Callable[[Mark], bool]) -> list[psutil.Process]:
    """Running processes, except this one, whose mark meets ``condition``. Zombies have no environment."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = _read(process.environ().get(MARK, "")) if process.pid != os.getpid() else None
            if mark is not None and condition(mark):
                processes.append(process)
    return processes


def end_marked(condition: Callable[[Mark], bool], check: Callable[[], None] = lambda: None) -> None:
    """Kill the marked processes, including stopped ones, and wait until none is left.

    check   called while waiting; may raise to end the wait
    """
    while living := marked(condition):
        for process in living:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        check()
        time.sleep(LOOK_SECONDS)


def locks_folder() -> Path:
    """The folder for locks on this host's disk, shared by all endpoints of this user.

    Raises ConfigError if another user has created it.
    """
    path = Path(tempfile.gettempdir()) / f"sa3dist-serve-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path}: belongs to another user; remove it, or set TMPDIR")
    return path


def take_lock(path: Path, clear: Callable[[], None], check: Callable[[], None]) -> int:
    """Lock a file; returns its descriptor. Processes that inherit the descriptor hold the lock, too.

    clear   called repeatedly after LINGER_SECONDS of waiting, to end processes that should not hold the lock
    check   called while waiting; may raise to end the wait
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    begin = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            check()
            if time.monotonic() - begin > LINGER_SECONDS:
                clear()
            time.sleep(LOOK_SECONDS)
