"""run.lock: lets one run at a time write to an output directory, and shows that this run is alive.

Rank 0 takes it before anything else is written and releases it together with its status. A killed run leaves the lock
behind. On the same machine others see that its process is gone; on another machine, that its heartbeat has stopped.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sa3dist.errors import EnvironmentFailure, InUse
from sa3dist.runtime.file_lock import lock, opened_alone

log = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
BEAT_SECONDS = 3.0
# Another machine's lock is dead if it has not changed for this long.
DEAD_SECONDS = 60.0
# If its time is already older than that, watch it only until a live run would have renewed it, with some margin for a
# slow disk: the clocks of two machines may differ by anything.
DOUBT_SECONDS = 15.0
LOOK_SECONDS = 0.5
# How long to wait for a file that another process has locked, to read or to write it.
FILE_LOCK_SECONDS = 5.0
# Where files cannot be locked, a written lock is read again after this time.
AGAIN_SECONDS = 1.0
# Where nothing can be written, there is no other run to keep out.
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}

# Tokens of the locks held by this process, or by rank 0 of its run; and which of them another run has taken over.
_held: dict[Path, str] = {}
_lost: dict[Path, EnvironmentFailure] = {}
_ended: dict[Path, threading.Event] = {}

Owner = dict[str, Any]


def take(
    directory: Path, check_stop: Callable[[], None] = lambda: None, each_beat: Callable[[], None] = lambda: None
) -> str | None:
    """Take the lock of an output directory and keep it alive until ``release``. Returns its token for ``adopt``.

    check_stop   called while a lock of another machine is watched; what it raises ends the wait
    each_beat    called at each beat by the thread that keeps the lock, while the lock is this run's
    Returns None where nothing can be written; code that needs the directory reports that. Raises InUse when a live run
    holds the lock.
    """
    path = _path(directory)
    mine = {"token": uuid.uuid4().hex, "beat": 0, "time": time.time(), **this_process()}
    watched = _Watched(directory)
    try:
        while not _try_to_take(path, mine, watched):
            check_stop()
            time.sleep(LOOK_SECONDS)
    except OSError as failure:
        if failure.errno not in NOT_WRITABLE:
            raise
        if is_anothers(directory):
            raise refusal(directory, peek(directory) or mine) from None
        return None
    _held[path], _ended[path] = mine["token"], threading.Event()
    threading.Thread(target=_keep, args=(path, mine, _ended[path], each_beat), name="lock", daemon=True).start()
    return mine["token"]


def adopt(directory: Path, token: str | None) -> None:
    """Register the lock that rank 0 of this run holds."""
    if token is not None:
        _held[_path(directory)] = token


def release(directory: Path) -> None:
    """Release the lock, if this process has taken it."""
    path = _path(directory)
    ended = _ended.pop(path, None)
    if ended is None:
        return
    ended.set()
    token = _held.pop(path, None)
    with contextlib.suppress(OSError), _opened(path, create=False) as handle:
        owner = _read(handle)
        if owner is not None and owner["token"] == token:
            path.unlink()


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the lock during a block. Raises InUse when a live run holds it."""
    take(directory)
    try:
        yield
    finally:
        release(directory)


def release_all() -> None:
    """Release every lock, for an exit that no longer knows the directory."""
    for path in list(_ended):
        release(path.parent)


def lost(directory: Path) -> EnvironmentFailure | None:
    """An error if another run has taken over the lock because this one showed no sign of life."""
    return _lost.get(_path(directory))


def is_anothers(directory: Path) -> bool:
    """Whether another run, alive or possibly alive, writes to the directory; then write nothing to it."""
    path = _path(directory)
    owner = peek(directory)
    if owner is None or owner["token"] == _held.get(path):
        return False
    living = lives(owner)
    return _age_seconds(owner) < DEAD_SECONDS if living is None else living


def peek(directory: Path) -> Owner | None:
    """The content of the lock, if there is one and it is readable."""
    for _ in range(3):
        with contextlib.suppress(OSError):
            data = _path(directory).read_bytes()
            if (owner := _parse(data)) is not None or not data:
                return owner
            # Read in the middle of a write: try again.
            time.sleep(0.05)
    return None


def refusal(directory: Path, owner: Owner) -> InUse:
    return InUse(
        f"output_dir: {directory} is in use by process {owner['pid']} on {owner['host']}; wait for it, stop it, or "
        f"choose another output_dir"
    )


def this_process() -> Owner:
    """This process, described so that others can tell whether it lives."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "start": start_ticks(pid), "processes": process_space()}


def lives(owner: Owner) -> bool | None:
    """Whether a lock's process lives; None if that cannot be seen from here: another machine or container."""
    if owner["processes"] != process_space():
        return None
    start = start_ticks(owner["pid"])
    return start is not None and start == owner["start"]


@functools.cache
def process_space() -> list[str]:
    """Equal for processes with common process ids: the same boot of the machine, the same pid namespace."""
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        # A sandbox hides them. A random id equals no other; a lost process then shows by its missing heartbeat.
        return [uuid.uuid4().hex, ""]


class _Watched:
    """Watches a lock of another machine for signs of life."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: Owner | None = None
        self._since = time.monotonic()
        self._needed = 0.0

    def is_dead(self, owner: Owner) -> bool:
        """Whether it has been silent for too long. Raises InUse when it has changed since the last look."""
        now = time.monotonic()
        if self._seen is None or owner["token"] != self._seen["token"]:
            self._seen, self._since = owner, now
            age = _age_seconds(owner)
            self._needed = DOUBT_SECONDS if age > DEAD_SECONDS else DEAD_SECONDS
            log.info(
                "output_dir: %s was in use by process %d on %s %.0f s ago; watching for %.0f s whether it still lives",
                *(self._directory, owner["pid"], owner["host"], age, self._needed),
            )
        elif owner != self._seen:
            raise refusal(self._directory, owner)
        return now - self._since >= self._needed


def _try_to_take(path: Path, mine: Owner, watched: _Watched) -> bool:
    """False: the lock must be looked at again. Raises InUse."""
    with _opened(path, create=True) as handle:
        owner = _read(handle)
        if owner is not None:
            living = lives(owner)
            if living:
                raise refusal(path.parent, owner)
            if living is None and not watched.is_dead(owner):
                return False
        _write(handle, mine)
        # Whoever may write to the directory may take over a dead run in it, so let them write the lock too.
        with contextlib.suppress(PermissionError):
            os.fchmod(handle, 0o644 | path.parent.stat().st_mode & 0o666)
        guarded = lock(handle)
    if not guarded:
        # Two runs may have found the same dead lock at once: the last one to write gets it.
        time.sleep(AGAIN_SECONDS)
        owner = peek(path.parent)
        if owner is None or owner["token"] != mine["token"]:
            raise refusal(path.parent, owner or mine)
    return True


def _keep(path: Path, mine: Owner, ended: threading.Event, each_beat: Callable[[], None]) -> None:
    """Renew the lock until ``ended``, or until another run has taken it over."""
    while not ended.wait(BEAT_SECONDS):
        # The disk may be gone; code that needs it reports that.
        with contextlib.suppress(OSError), _opened(path, create=False) as handle:
            owner = _read(handle)
            if owner is not None and owner["token"] != mine["token"]:
                _lost[path] = EnvironmentFailure(
                    f"output_dir: process {owner['pid']} on {owner['host']} has taken over {path.parent}, for this run "
                    f"showed no sign of life for a minute (suspended, or its disk out of reach); it ends here"
                )
                return
            mine = {**mine, "beat": mine["beat"] + 1, "time": time.time()}
            _write(handle, mine)
        each_beat()


def _opened(path: Path, create: bool) -> contextlib.AbstractContextManager[int]:
    """The file, locked by this process. Raises OSError, also when another process keeps it locked for too long."""
    deadline = time.monotonic() + FILE_LOCK_SECONDS

    def not_for_ever() -> None:
        # Its holder may be frozen.
        if time.monotonic() > deadline:
            raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path))

    return opened_alone(path, create, not_for_ever)


def _read(handle: int) -> Owner | None:
    return _parse(os.pread(handle, 1 << 16, 0))


def _write(handle: int, owner: Owner) -> None:
    data = json.dumps(owner).encode() + b"\n"
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))


def _parse(data: bytes) -> Owner | None:
    """None if the writer was killed in the middle of a write."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        owner = json.loads(data)
        if all(owner[key] is not None for key in ("token", "pid", "host", "processes", "time")):
            return owner
    return None


def _age_seconds(owner: Owner) -> float:
    """Seconds since its last beat, by the clocks of two machines."""
    return max(0.0, time.time() - owner["time"])


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        # Fields 3 and 22, counted from behind the name, which may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _path(directory: Path) -> Path:
    return Path(os.path.abspath(directory)) / LOCK_NAME
