"""One process at a time at a file, of any machine that sees it; a process that is killed lets go."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Filesystems on which files cannot be locked: there nobody is kept waiting.
NO_FILE_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
LOOK_SECONDS = 0.02


@contextlib.contextmanager
def opened_alone(path: Path, create: bool, check_stop: Callable[[], None]) -> Iterator[int]:
    """A file descriptor of ``path``, for reading and writing, that no other process has in this way meanwhile.

    create       make it, and its folder, where there is none
    check_stop   called now and then while another process has it; what it raises ends the wait
    """
    while True:
        try:
            handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        except FileNotFoundError:
            if not create:
                raise
            # Not there yet, or removed a moment ago by the last one who needed it.
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            # None: what cannot be locked keeps nobody waiting.
            while lock(handle) is False:
                check_stop()
                time.sleep(LOOK_SECONDS)
            # It may have been removed between the two: then another file has the name, or none.
            if _is_at(handle, path):
                yield handle
                return
        finally:
            os.close(handle)


@contextlib.contextmanager
def alone(path: Path, check_stop: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A block that one process at a time is in; ``path`` is there as long."""
    with opened_alone(path, create=True, check_stop=check_stop):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def lock(handle: int) -> bool | None:
    """Lock an open file. False while another process has it; None where the filesystem locks no files."""
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
