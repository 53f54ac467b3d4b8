"""A program as the only work of its process: its output streams, crashes, exit code, and a quick exit."""

from __future__ import annotations

import atexit
import contextlib
import errno
import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from sa3dist.errors import EXIT_ENVIRONMENT
from sa3dist.runtime.exact_products import keep_products_exact
from sa3dist.runtime.nameless_user import keep_caches_without_a_name
from sa3dist.runtime.signals import kill_loaders

# Limit for the exit functions of libraries.
EXIT_FUNCTIONS_SECONDS = 30.0
# Errors of a write to a terminal or pipe that nobody reads any more.
NO_READER = {errno.EIO, errno.EPIPE, errno.ENXIO}


class DetachableStream:
    """A text stream that discards its output once its reader is gone, instead of raising.

    The run goes on, saves, and writes how it ended to its files, as under nohup.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as failure:
            self._detach(failure)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as failure:
            self._detach(failure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _detach(self, failure: OSError) -> None:
        if failure.errno not in NO_READER:
            failure.filename = self._stream.name
            raise failure
        # Replace the stream's own file descriptor: what is still buffered then goes to /dev/null too, at exit at the
        # latest.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def as_process(program: Callable[[], int]) -> NoReturn:
    """Run ``program`` as this process's only work and exit with its code. A crash below Python prints its stack.

    Ends with 70 when stdout or stderr cannot be written, for example on a full disk.
    """
    # In this order: otherwise a file of the run could get the number of a closed stream, and libraries would print into
    # it.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    sys.stdout, sys.stderr = DetachableStream(sys.stdout), DetachableStream(sys.stderr)
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        # stderr may have no file descriptor.
        faulthandler.enable()
    try:
        keep_products_exact()
        keep_caches_without_a_name()
        code = program() if _has_working_directory() else EXIT_ENVIRONMENT
        sys.stdout.flush()
    except OSError as failure:
        if failure.filename not in ("<stdout>", "<stderr>"):
            raise
        code = EXIT_ENVIRONMENT
        with contextlib.suppress(OSError):
            print(f"{failure.filename}: cannot write ({failure.strerror})", file=sys.stderr, flush=True)
    end_process(code)


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError as failure:
        # Without this check MKL ends the process while torch is imported, with exit code 2, the code of a user's
        # mistake.
        print(f"the working directory is gone ({failure.strerror}); cd to one that exists", file=sys.stderr)
        return False
    return True


def end_process(code: int) -> NoReturn:
    """Exit without tearing the interpreter down; the system frees the memory.

    The teardown collects what DeepSpeed leaves: five seconds, half a minute on a busy machine, which is as long as
    launch agents wait between SIGTERM and SIGKILL. A thread that hangs in a torch operator would abort it.
    """
    kill_loaders()
    _flush()
    # An exit function may wait without limit, for a server that does not answer.
    limit = threading.Timer(EXIT_FUNCTIONS_SECONDS, os._exit, [code])
    limit.daemon = True
    limit.start()
    atexit._run_exitfuncs()
    limit.cancel()
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # ``as_process`` has already reported a stream that cannot be written.
        with contextlib.suppress(OSError):
            stream.flush()
