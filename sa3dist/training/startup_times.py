"""Where the time between the command and the first step goes, by part, and what is done to shorten it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)


class Startup:
    """Seconds of every part, in the order they came; ``total`` counts from the start of this process.

    The launcher's own start is not in it. ``before_run`` is what lies between the process's start and this object:
    the interpreter, imports, reading the settings, joining the other processes.
    """

    def __init__(self) -> None:
        self._begin = time.monotonic() - seconds_since_start()
        self._training: float | None = None
        self._told = False
        self.seconds: dict[str, float] = {"before_run": self._age()}

    def _age(self) -> float:
        return round(time.monotonic() - self._begin, 3)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block as ``name``; once the first step is done nothing counts any more."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if "total" not in self.seconds:
                self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begin, 3)

    def training(self) -> None:
        """From here on the loop has the word."""
        self._training = time.perf_counter()

    def first_step_done(self, waited: float) -> None:
        """waited: seconds of the first step spent on its data."""
        self.seconds["first_batch"] = round(waited, 3)
        self.seconds["first_step"] = round(time.perf_counter() - self._training - waited, 3)
        self.seconds["total"] = self._age()
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items() if name != "total")
        log.info("first step after %.1f s: %s", self.seconds["total"], parts)

    def once(self) -> dict[str, dict[str, float]]:
        """What the first row of metrics.jsonl says of it; nothing for later rows."""
        told, self._told = self._told, True
        return {} if told else {"startup_seconds": self.seconds}


def timed(name: str) -> Callable[[Callable], Callable]:
    """A method of something with a ``startup``, counted as the part ``name``."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def counted(self, *arguments, **keywords):
            with self.startup.part(name):
                return method(self, *arguments, **keywords)

        return counted

    return decorate


def seconds_since_start() -> float:
    """Age of this process, to the kernel's hundredths of a second."""
    # Both count from the machine's start; the wall clock may have been set since, by seconds.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    ticks = int(fields[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def imported_beside(module: str) -> Iterator[None]:
    """Import a module that is needed later in a thread of its own while the block runs."""

    def fetch() -> None:
        # What fails here fails again, and is told, where the module is needed.
        with contextlib.suppress(Exception):
            importlib.import_module(module)

    thread = threading.Thread(target=fetch, name=f"import {module}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        # Two threads must not be among the same modules.
        thread.join()


def keep_kernels_in(directory: Path) -> None:
    """Where Triton leaves what it has compiled for the next run, unless the environment says so already."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(directory))
