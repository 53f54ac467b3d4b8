"""NVIDIA's driver before torch is imported: whether one will be used, and starting it meanwhile."""

import contextlib
import ctypes
import os
import threading
from pathlib import Path

# There on a machine with the driver.
DEVICE_FILE = Path("/dev/nvidiactl")
LIBRARY = "libcuda.so.1"


def expected() -> bool:
    """Whether this process will probably compute on a GPU."""
    told_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    return DEVICE_FILE.exists() and not told_cpu and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def start() -> None:
    """Let a thread start the driver, where it is ``expected``: that takes up to seconds, without the interpreter.

    Once a process has started it, starting it again does nothing.
    """
    if expected():
        threading.Thread(target=_start, name="start the driver", daemon=True).start()


def _start() -> None:
    # What fails here fails again, and is told, when torch starts it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(LIBRARY).cuInit(0)
