"""Results of loader processes on their way to the main one, and how these processes end."""

from __future__ import annotations

import contextlib
import errno
import signal
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sa3dist.errors import Interrupted
from sa3dist.runtime.exit_status import no_shared_memory
from sa3dist.runtime.signals import SIGNALS, kill_loaders


def share(tensors: Iterable[torch.Tensor]) -> None:
    """In a loader process, put tensors where the main one can take them from. Raises EnvironmentFailure without room.

    The loader would do so in a thread, whose failure nobody hears of: the main process would wait for ever.
    """
    if get_worker_info() is None:
        return
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise no_shared_memory(str(error)) from error


@contextlib.contextmanager
def naming_shared_memory() -> Iterator[None]:
    """Where locks and queues of loader processes are made, which lie there too. Raises EnvironmentFailure."""
    try:
        yield
    except OSError as error:
        # One that names a file is about that.
        if error.errno == errno.ENOSPC and error.filename is None:
            raise no_shared_memory(error.strerror) from error
        raise


@contextlib.contextmanager
def hanging_processes_left_behind() -> Iterator[None]:
    """Where a wait for the loader is broken off: it would wait for each of its processes in turn, for 5 s."""
    try:
        yield
    except Interrupted:
        kill_loaders()
        raise


def leave_signals_to_the_main_process(worker: int) -> None:
    # A terminal's Ctrl-C and Slurm's signals reach the whole process group; a worker that dies of one fails the step.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def results_of_workers(
    dataset: Dataset, num_workers: int, device: torch.device, sampler: Iterable[int] | None = None
) -> Generator[Any, None, None]:
    """What loader processes make of ``dataset``, in order, in pinned memory where ``device`` is CUDA.

    An SA3DistError comes as a value: raised in the process, its one line would be buried under a worker's traceback.
    """
    ready = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
    )
    # By a name: the loop alone would let go of the processes, and wait for them, before they can be killed.
    with naming_shared_memory():
        results = iter(ready)
    try:
        with hanging_processes_left_behind():
            yield from results
    finally:
        del results
