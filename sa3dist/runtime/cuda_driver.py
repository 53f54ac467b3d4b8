"""Start NVIDIA's driver before torch is imported, where a GPU will probably be used."""

import contextlib
import ctypes
import os
import threading
from pathlib import Path

# Exists on machines with the driver.
DEVICE_FILE = Path("/dev/nvidiactl")
LIBRARY = "libcuda.so.1"


def expected() -> bool:
    """Whether this process will probably compute on a GPU."""
    told_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    return DEVICE_FILE.exists() and not told_cpu and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def start() -> None:
    """Start the driver in a thread if it is ``expected``: that takes up to seconds, without holding the interpreter.

    Once a process has started it, starting it again does nothing.
    """
    if expected():
        threading.Thread(target=_start, name="start the driver", daemon=True).start()


def _start() -> None:
    # What fails here fails again, with a message, when torch starts the driver.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(LIBRARY).cuInit(0)
