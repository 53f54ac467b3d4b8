"""Where the time between the command and the first step goes, by part, and three ways to shorten it."""

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

# How long a thread that imports keeps the interpreter from others that ask for it: reading a base takes it for moments,
# thousands of times. Python's own 5 ms make the reading half as long again.
SHARING_SECONDS = 5e-4


class Startup:
    """Seconds of each part of the start, in the order they came; a part lasts until the next one begins.

    seconds   by part. "before_run" is the interpreter, imports, reading the settings and joining the other processes,
              but not the launcher's own start. "total", there once the first step is done, is the sum
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._part, self._since = "before_run", time.monotonic() - seconds_since_start()

    def begin(self, part: str) -> None:
        """Close the part before and open this one; one that comes again adds up. No effect after the first step."""
        now = time.monotonic()
        if "total" not in self.seconds:
            self.seconds[self._part] = round(self.seconds.get(self._part, 0.0) + now - self._since, 3)
            self._part, self._since = part, now

    def first_step_done(self, waited: float) -> None:
        """Close the part "first_step". waited: seconds of it spent on data, which become the part "first_batch"."""
        self.begin("")
        first_step = self.seconds.pop("first_step")
        self.seconds |= {"first_batch": round(waited, 3), "first_step": round(first_step - waited, 3)}
        parts = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        self.seconds["total"] = round(sum(self.seconds.values()), 3)
        log.info("first step after %.1f s: %s", self.seconds["total"], parts)


@contextlib.contextmanager
def imported_beside(*modules: str) -> Iterator[None]:
    """Import modules that are needed later in a thread of its own while the block runs."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SHARING_SECONDS)
    try:
        # Waited for at the end: two threads must not be among the same modules.
        with ThreadPoolExecutor(1, f"import {', '.join(modules)}") as executor:
            for module in modules:
                # What fails here fails again, and is told, where the module is needed.
                executor.submit(importlib.import_module, module)
            yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def libraries_beside(device: torch.device) -> Iterator[None]:
    """Let a thread make a CUDA device's libraries ready while the block runs: they leave the interpreter to others."""
    # What fails there fails again, and is told, where the device is needed.
    with ThreadPoolExecutor(2, "load the libraries") as executor:
        if device.type == "cuda":
            executor.submit(use_libraries, device)
            executor.submit(hash_triton)
        yield


def use_libraries(device: torch.device) -> None:
    """One product of each kind, and one convolution: the first of a process takes hundreds of milliseconds.

    What cuBLAS and cuDNN keep for the thread goes to the next one that asks.
    """
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(64, 64, device=device, dtype=dtype)
        torch.addmm(square[0], square @ square, square)
        torch.nn.functional.conv1d(square[None], square[:, :, None])


def hash_triton() -> None:
    """What Triton finds kept kernels by: a digest of its 400 MB of code, made once per process."""
    from triton.runtime.cache import triton_key

    triton_key()


def keep_kernels_in(directory: Path) -> None:
    """Where Triton leaves what it has compiled for the next run, unless the environment says so already."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(directory))
