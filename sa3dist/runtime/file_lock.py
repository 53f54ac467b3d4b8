"""Lock a file for one process at a time, across machines that share it; a killed process releases it."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Errors of filesystems that cannot lock files: nobody waits there.
NO_FILE_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
LOOK_SECONDS = 0.02


@contextlib.contextmanager
def opened_alone(path: Path, create: bool, check_stop: Callable[[], None]) -> Iterator[int]:
    """An open file descriptor of ``path``, for reading and writing, locked against other callers of this function.

    create       make the file and its folder if missing
    check_stop   called repeatedly while another process holds the lock; what it raises ends the wait
    """
    while True:
        try:
            handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        except FileNotFoundError:
            if not create:
                raise
            # Missing, or just removed by the last process that needed it.
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            # lock() returns None where files cannot be locked: do not wait there.
            while lock(handle) is False:
                check_stop()
                time.sleep(LOOK_SECONDS)
            # The file may have been removed between opening and locking: then the name belongs to another file or to
            # none.
            if _is_at(handle, path):
                yield handle
                return
        finally:
            os.close(handle)


@contextlib.contextmanager
def alone(path: Path, check_stop: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A block that one process at a time runs; ``path`` exists as long."""
    with opened_alone(path, create=True, check_stop=check_stop):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def lock(handle: int) -> bool | None:
    """Lock an open file. False while another process holds it; None where the filesystem cannot lock files."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as failure:
        if failure.errno not in NO_FILE_LOCKS:
            raise
        return None
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
