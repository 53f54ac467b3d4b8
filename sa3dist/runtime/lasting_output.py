"""Output streams whose reader may go before the program does: a closed terminal, a `tee` that was killed with it."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO

# What a write to a terminal, or to a pipe, raises when nobody is left at the other end.
NO_READER = {errno.EIO, errno.EPIPE, errno.ENXIO}


class Lasting:
    """A text stream that is written to in vain, rather than not at all, once its reader is gone.

    The run goes on, saves and says in its files how it ended; as under nohup, nobody reads the rest.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as failure:
            self._let_go(failure)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as failure:
            self._let_go(failure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _let_go(self, failure: OSError) -> None:
        if failure.errno not in NO_READER:
            raise failure
        # In the place of the stream's own file: what waits in its buffer goes there too, at the latest at the exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def outlive_readers() -> None:
    """Make this process's stdout and stderr lasting."""
    # Without the one or the other there is nothing to outlive.
    sys.stdout, sys.stderr = (stream and Lasting(stream) for stream in (sys.stdout, sys.stderr))
