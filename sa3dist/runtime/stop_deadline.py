"""Leave in time when asked to stop, whatever the main thread is at, as long as there is nothing to save.

Python runs a signal's handler between two instructions of the main thread, and the program looks at the request where
it polls. An import, a base read from a slow disk, or joining ranks of which one is gone may keep both for longer than
launch agents and schedulers wait, which is 30 s, before they kill.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import torch.distributed as dist

from sa3dist.errors import Interrupted
from sa3dist.runtime.exit_status import RANK_0_SECONDS, report
from sa3dist.runtime.peers import leave_stopped
from sa3dist.runtime.signals import SIGNALS, StopRequest
from sa3dist.runtime.watchdog import bounded

# Half of what agents wait, with as much left for words to peers and disk; ranks that poll are gone long before.
LEAVE_SECONDS = 15.0

# For good: the system writes a byte to that number at every signal, also when another file has it by then.
_KEPT_OPEN: list[tuple[socket.socket, socket.socket]] = []


def leave_in_time(stop: StopRequest, output_dir: Path) -> None:
    """From the first stop signal on, end this process after LEAVE_SECONDS unless ``stop.holds_state`` by then.

    output_dir   where status.json says so
    Call from the main thread, once, after ``stop.install()``.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _KEPT_OPEN.append((reader, writer))
    # Written to at once, by the system's own handler: the thread below sees signals the main thread has no time for.
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # A child shares the socket, and its signals are its own.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_wait, args=(reader, stop, output_dir), daemon=True).start()


def _wait(reader: socket.socket, stop: StopRequest, output_dir: Path) -> None:
    asked = None
    while asked is None:
        asked = next((number for number in reader.recv(64) if number in SIGNALS), None)
    # The main thread may be in a reduction, waiting for a rank that waits for its loader, and would hear of it last.
    stop.hear(signal.Signals(asked).name)
    time.sleep(LEAVE_SECONDS)
    if stop.holds_state:
        return
    name = signal.Signals(asked).name
    why = Interrupted(f"{name} during preparation; finished work is kept, run the same command to continue")
    if dist.is_initialized():
        # Peers would take a rank that leaves without a word for killed.
        why = bounded(lambda: leave_stopped(why)) or why
    # The disk may be what the main thread waits for.
    bounded(lambda: report(why, output_dir, 0, RANK_0_SECONDS))
    # Workers of a pool wait for a parent that says goodbye.
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(why.exit_code)
