"""The time between the command and the first step, by part, and three ways to shorten it."""

import contextlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sa3dist.runtime.signals import seconds_since_start

log = logging.getLogger(__name__)

# How long an importing thread may keep the interpreter when others ask for it. Reading a base asks thousands of times,
# briefly: Python's own 5 ms make it half as long again.
SHARING_SECONDS = 5e-4


class Startup:
    """Seconds of each part of the start, in order; a part lasts until the next one begins.

    seconds   by part. "before_run" is the interpreter, imports, reading the settings and joining the other processes,
              but not the launcher's own start. "total", set when the first step is done, is the sum
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._part, self._since = "before_run", time.monotonic() - seconds_since_start()

    def begin(self, part: str) -> None:
        """End the current part and begin this one; repeated parts add up. No effect after the first step."""
        now = time.monotonic()
        if "total" not in self.seconds:
            self.seconds[self._part] = round(self.seconds.get(self._part, 0.0) + now - self._since, 3)
            self._part, self._since = part, now

    def first_step_done(self, waited: float) -> None:
        """End the part "first_step". waited: its seconds spent on data, which become the part "first_batch"."""
        self.begin("")
        first_step = self.seconds.pop("first_step")
        self.seconds |= {"first_batch": round(waited, 3), "first_step": round(first_step - waited, 3)}
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        self.seconds["total"] = round(sum(self.seconds.values()), 3)
        log.info("first step after %.1f s: %s", self.seconds["total"], parts)


@contextlib.contextmanager
def imported_beside(*modules: str) -> Iterator[None]:
    """Import modules that are needed later in a thread while the block runs."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SHARING_SECONDS)
    try:
        # Wait for it at the end: two threads must not import the same modules at once.
        with ThreadPoolExecutor(1, f"import {', '.join(modules)}") as executor:
            for module in modules:
                # An import that fails here fails again, with a message, where the module is used.
                executor.submit(importlib.import_module, module)
            yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def libraries_beside(device: torch.device) -> Iterator[None]:
    """Prepare a CUDA device's libraries in threads while the block runs; they do not hold the interpreter."""
    # What fails here fails again, with a message, where the device is used.
    with ThreadPoolExecutor(2, "load the libraries") as executor:
        if device.type == "cuda":
            executor.submit(use_libraries, device)
            executor.submit(hash_triton)
        yield


def use_libraries(device: torch.device) -> None:
    """Run one product of each kind and one convolution: a process's first takes hundreds of milliseconds.

    The handles that cuBLAS and cuDNN make for this thread are reused by the next thread.
    """
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(64, 64, device=device, dtype=dtype)
        torch.addmm(square[0], square @ square, square)
        torch.nn.functional.conv1d(square[None], square[:, :, None])


def hash_triton() -> None:
    """Compute Triton's cache key, a digest of its 400 MB of code, once per process."""
    from triton.runtime.cache import triton_key

    triton_key()


def keep_kernels_in(directory: Path) -> None:
    """Set Triton's cache directory, unless the environment already does."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(directory))
