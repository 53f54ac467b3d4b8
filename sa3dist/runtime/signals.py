"""Stop requests: a signal, or the end of the allowed time, asks for a save at the next step boundary.

A signal repeated later ends the process at once.
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

from sa3dist.errors import EXIT_INTERRUPTED, ConfigError, Interrupted
from sa3dist.runtime import run_lock

# SIGHUP comes when the terminal, or the connection to it, is gone.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Sent by a thread to its own process's main thread, to end a wait.
BREAK_SIGNAL = signal.SIGALRM
# Launch agents and schedulers repeat a signal within milliseconds; a person who means it waits longer.
SAME_REQUEST_SECONDS = 5.0
AGAIN = "run the same command to continue"
# How long releasing the lock may take in an immediate exit.
RELEASE_SECONDS = 1.0
# How long a process takes to end after its last save.
EXIT_SECONDS = 5.0
# prctl option of Linux.
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was asked to stop. While ``saving`` is true no signal ends it.

    waiting   the main thread is in a wait that may never end and that may be broken off
    judge     applied to the error that ends a run (``start_limit``)
    """

    def __init__(self) -> None:
        self.judge: Callable[[Exception], Exception] = lambda failure: failure
        self.signal_name: str | None = None
        self.saving = False
        self.waiting = False
        self._heard: str | None = None
        self._signals: int | None = None
        self._first_at = 0.0
        self._ends_at: float | None = None
        self._allowed_seconds = 0.0
        self._reserve_seconds = EXIT_SECONDS
        self._stepped = False

    def install(self) -> StopRequest:
        """Handle the stop signals from now on. Call from the main thread."""
        handle_signals(self._handle)
        signal.signal(BREAK_SIGNAL, self._end_wait)
        # Never closed: the system writes to this descriptor at every signal, even if another file had its number by
        # then.
        self._signals, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A forked child shares the pipe, but its signals are its own.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        return self

    def requested(self) -> bool:
        return self.reason is not None

    def raise_if_requested(self, doing: str) -> None:
        """doing: what is interrupted, for the message: "while ..."."""
        if self.reason is not None:
            raise Interrupted(f"{self.reason} while {doing}; finished work is kept, {AGAIN}")

    @property
    def reason(self) -> str | None:
        """What asked this process to stop, if anything did."""
        if self.signal_name is not None:
            return self.signal_name
        if self._time_is_up():
            return f"max_wall_time ({self._allowed_seconds:.0f} s) nearly over"
        return self._heard

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit alone has stopped this process, before its first step."""
        return self.signal_name is None and self._time_is_up() and not self._stepped

    def _time_is_up(self) -> bool:
        return self._ends_at is not None and time.monotonic() > self._ends_at - self._reserve_seconds

    def hear(self, reason: str) -> None:
        """Note a request made to another rank, or to this one while its main thread runs no signal handlers."""
        self._heard = reason

    def hear_signals(self) -> None:
        """Read signals in another thread: the main one runs no handlers in an import, a slow read or a collective."""
        if self._signals is not None:
            # The C-level handler writes the number of each signal to the pipe.
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
        """End the main thread's ``breakable`` block, from another thread. Does nothing outside of such a block."""
        signal.pthread_kill(threading.main_thread().ident, BREAK_SIGNAL)

    def _end_wait(self, number: int, frame) -> None:
        if self.waiting:
            self.waiting = False
            self.raise_if_requested("waiting for data")

    def limit(self, allowed_seconds: float) -> None:
        """Ask to stop in time to be gone ``allowed_seconds`` after this program's start.

        Raises ConfigError if that is less than stopping may take.
        """
        if allowed_seconds <= EXIT_SECONDS:
            raise ConfigError(
                f"max_wall_time: {allowed_seconds:g} s is not more than the {EXIT_SECONDS:.0f} s kept for stopping; "
                f"choose a longer time"
            )
        self._allowed_seconds = allowed_seconds
        self._ends_at = time.monotonic() + allowed_seconds - seconds_since_start()

    def reserve(self, step_seconds: float, save_seconds: float) -> None:
        """After a step: reserve time for stopping, twice the last step and save, since the next may be slower."""
        self._stepped = True
        self._reserve_seconds = EXIT_SECONDS + 2 * (step_seconds + save_seconds)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._first_at = now
        elif now - self._first_at > SAME_REQUEST_SECONDS and not self.saving:
            exit_now(EXIT_INTERRUPTED)


def handle_signals(handler: Callable[[int, Any], None]) -> None:
    """Call ``handler`` on the stop signals."""
    for number in SIGNALS:
        # Under nohup SIGHUP is ignored: the run outlives its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def seconds_since_start() -> float:
    """Age of this process in seconds, imports included; independent of the time of day."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - run_lock.start_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")


def exit_now(code: int) -> NoReturn:
    """End this process and those it has started, whatever its threads wait for."""
    # In a thread with a limit, as the disk may not answer: a lock without a live process counts for nothing anyway.
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
    """Have Linux kill this process when its parent ends, however that happens. Does nothing on other systems."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_loaders() -> None:
    """Kill this process's loader processes, which ignore stop signals. For the main thread, before it exits."""
    # Otherwise torch's handler would raise here when they end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
