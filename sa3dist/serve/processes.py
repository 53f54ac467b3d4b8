"""Processes of jobs on this host: marked by their environment, found by it, ended; and locks that they hold.

A process id alone tells nothing: it may belong to another process by now. The mark is in the environment, which
children inherit, and a lock goes with the last process that holds its file open.
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
# What a process that has done its last work may take to let go of a lock.
LINGER_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Mark:
    """What the processes of one attempt carry in their environment.

    locks     folder of the locks they are under
    store     folder of the jobs: another endpoint's on this host have nothing to do with ours
    devices   numbers of the GPUs, without those of slots
    """

    locks: str
    store: str
    job: str
    fence: int
    devices: tuple[int, ...]

    def environment(self) -> dict[str, str]:
        return {MARK: json.dumps(dataclasses.asdict(self))}

    def is_of(self, other: Mark) -> bool:
        """Whether both are of one store, on one host."""
        return (self.locks, self.store) == (other.locks, other.store)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Mark:
        return cls(**values | {"devices": tuple(values["devices"])})


def _read(text: str) -> Mark | None:
    # Anybody can set a variable of that name to anything.
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return Mark.of_json(json.loads(text))
    return None


def marked(condition: Callable[[Mark], bool]) -> list[psutil.Process]:
    """The living processes whose mark meets ``condition``, this one excepted. Zombies have no environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = _read(process.environ().get(MARK, "")) if process.pid != os.getpid() else None
            if mark is not None and condition(mark):
                found.append(process)
    return found


def end_marked(condition: Callable[[Mark], bool], check: Callable[[], None] = lambda: None) -> None:
    """Kill the marked processes, and return when none is left, stopped ones included.

    check   called while there are some; what it raises ends the wait
    """
    while living := marked(condition):
        for process in living:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        check()
        time.sleep(LOOK_SECONDS)


def locks_folder() -> Path:
    """Where the locks of this host are: on its own disk, the same for all endpoints of this user.

    Raises ConfigError when somebody else has made it.
    """
    path = Path(tempfile.gettempdir()) / f"sa3dist-serve-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path}: belongs to another user; remove it, or set TMPDIR")
    return path


def take_lock(path: Path, clear: Callable[[], None], check: Callable[[], None]) -> int:
    """Lock a file for this process and those that are given the descriptor, which is returned.

    clear   called again and again while it stays locked, after a moment, to end those that should not hold it
    check   called while waiting; what it raises ends the wait
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
