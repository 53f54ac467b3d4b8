"""Stop requests: a signal, or the end of the allowed time, asks for a save at the next step boundary.

A late repeat of a signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import psutil

from sa3dist.errors import EXIT_INTERRUPTED, Interrupted
from sa3dist.runtime import run_lock

# The last one comes when the terminal, or the connection to it, is gone.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# What a thread sends the main one of its own process, to end a wait.
BREAK_SIGNAL = signal.SIGALRM
# Launch agents and schedulers repeat a signal within milliseconds; a person who means it waits longer.
SAME_REQUEST_SECONDS = 5.0
AGAIN = "run the same command to continue"
# How long giving back the lock may take at an end that waits for nothing.
RELEASE_SECONDS = 1.0
# What a process takes to end after its last save.
EXIT_SECONDS = 5.0
# Of Linux's prctl.
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was asked to stop. While ``saving`` is true no signal ends it.

    waiting   the main thread waits for something that may never come, and may be broken off
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.saving = False
        self.waiting = False
        self._heard: str | None = None
        self._signals: int | None = None
        self._first_at = 0.0
        self._ends_at: float | None = None
        self._allowed_seconds = 0.0
        self._reserve_seconds = EXIT_SECONDS

    def install(self) -> StopRequest:
        """Handle the stop signals from here on. From the main thread."""
        handle_signals(self._handle)
        signal.signal(BREAK_SIGNAL, self._end_wait)
        # Open for good: the system writes to that number at every signal, also when another file has it by then.
        self._signals, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A child shares the pipe, and its signals are its own.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        return self

    def requested(self) -> bool:
        return self.reason is not None

    def raise_if_requested(self, doing: str) -> None:
        """doing: what is ended by it, as said after "while"."""
        if self.reason is not None:
            raise Interrupted(f"{self.reason} while {doing}; finished work is kept, {AGAIN}")

    @property
    def reason(self) -> str | None:
        """What asked this process to stop, if anything did."""
        if self.signal_name is not None:
            return self.signal_name
        if self._ends_at is not None and time.monotonic() > self._ends_at - self._reserve_seconds:
            return f"max_wall_time ({self._allowed_seconds:.0f} s) nearly over"
        return self._heard

    def hear(self, reason: str) -> None:
        """Another rank was asked to stop, or this one while its main thread runs no handlers."""
        self._heard = reason

    def hear_signals(self) -> None:
        """For a thread beside the main one, which runs no handlers within an import, a slow read or a collective."""
        if self._signals is not None:
            # The system's own handler writes the number of each signal.
            with contextlib.suppress(BlockingIOError):
                for number in set(os.read(self._signals, 64)) & set(SIGNALS):
                    self.hear(signal.Signals(number).name)

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """A block of the main thread that ``break_off`` may end with Interrupted."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def break_off(self) -> None:
        """End the main thread's ``breakable`` block; for threads beside it. Without effect outside of one."""
        signal.pthread_kill(threading.main_thread().ident, BREAK_SIGNAL)

    def _end_wait(self, number: int, frame) -> None:
        if self.waiting:
            self.waiting = False
            self.raise_if_requested("waiting for data")

    def limit(self, allowed_seconds: float) -> None:
        """Ask to stop in time to be gone ``allowed_seconds`` after this program's start."""
        self._allowed_seconds = allowed_seconds
        self._ends_at = time.monotonic() + allowed_seconds - seconds_since_start()

    def reserve(self, step_seconds: float, save_seconds: float) -> None:
        """What stopping takes, from what a step and a save have taken: twice that, for the next may be slower."""
        self._reserve_seconds = EXIT_SECONDS + 2 * (step_seconds + save_seconds)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._first_at = now
        elif now - self._first_at > SAME_REQUEST_SECONDS and not self.saving:
            exit_now(EXIT_INTERRUPTED)


def handle_signals(handler: Callable[[int, Any], None]) -> None:
    """Have the stop signals call ``handler``."""
    for number in SIGNALS:
        # Under nohup a run outlives its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def seconds_since_start() -> float:
    """Age of this process, imports included; independent of the time of day."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - run_lock.start_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")


def exit_now(code: int) -> NoReturn:
    """End this process, whatever its threads wait for, and the processes it has started."""
    # Not waited for where its disk does not answer: without its process a lock counts for nothing.
    giving_back = threading.Thread(target=run_lock.release_all, daemon=True)
    giving_back.start()
    giving_back.join(RELEASE_SECONDS)
    kill_descendants(os.getpid())
    os._exit(code)


def kill_descendants(pid: int) -> None:
    """End the processes that a process has started, and theirs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def end_with_parent() -> None:
    """Have the system kill this process when the one that started it is gone, however that ended. Only on Linux."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_loaders() -> None:
    """End the loader processes of this one, which take no signal that asks. For the main thread, on its way out."""
    # Their loader would raise here when they end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
