"""Reads tensors of a safetensors file to a GPU, through pinned memory and in several threads."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sa3dist.errors import CheckpointError
from sa3dist.model.rewrite_safetensors import DTYPES, read_header

Item = TypeVar("Item")
Result = TypeVar("Result")

# One thread reads a few GB/s even from the page cache; the bus takes tens.
THREADS = 8
# Extra memory per tensor while it is read, on the host and on the device.
STAGED_BYTES = 16 << 20


def staged(device: torch.device | str) -> bool:
    """Whether tensors for ``device`` are read this way. For a CPU the file is mapped, and all cores convert."""
    return torch.device(device).type == "cuda"


class StagedFile:
    """A safetensors file whose tensors are read in pieces and converted on the device; thread-safe.

    A mapped file would take a page fault for every few kB, and the driver would copy in one thread.
    """

    def __init__(self, path: Path) -> None:
        """path: of a file that safetensors has opened, so its header is valid."""
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._header, self._begin = read_header(self._file, path)

    def holds(self, name: str) -> bool:
        """Whether ``read`` supports the tensor's dtype."""
        return self._header[name]["dtype"] in DTYPES

    def begin_of(self, name: str) -> int:
        """Offset of the tensor's first byte in the file."""
        return self._begin + self._header[name]["data_offsets"][0]

    def read(self, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """One tensor on ``device`` in ``dtype``. Raises CheckpointError if the file ends too early."""
        entry = self._header[name]
        stored, offset = DTYPES[entry["dtype"]], self.begin_of(name)
        result = torch.empty(entry["shape"], dtype=dtype, device=device)
        values, step = result.view(-1), STAGED_BYTES // stored.itemsize
        memory = torch.empty(min(step, len(values)), dtype=stored, pin_memory=result.is_cuda)
        for first in range(0, len(values), step):
            part = memory[: len(values) - first]
            self._read_into(part.view(torch.uint8).numpy(), offset + first * stored.itemsize)
            # Synchronous: the next piece is read into the same memory.
            values[first : first + step].copy_(part.to(device))
        return result

    def _read_into(self, target, offset: int) -> None:
        left = memoryview(target)
        while left:
            try:
                count = os.preadv(self._file.fileno(), [left], offset)
            except OSError as failure:
                failure.filename = str(self.path)
                raise
            if not count:
                raise CheckpointError(f"{self.path}: ends before its last tensor; the file is cut off")
            left, offset = left[count:], offset + count


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device | str) -> Iterable[Result]:
    """``work`` of each item, in order; in several threads if ``staged``, else one after the other.

    Raises the first exception in that order; items not started by then are skipped.
    """
    if not staged(device):
        yield from map(work, items)
        return
    index = torch.device(device).index
    # A new thread's current device is the first of the machine.
    here = torch.cuda.current_device() if index is None else index
    with ThreadPoolExecutor(THREADS, "read the base", torch.cuda.set_device, (here,)) as executor:
        yield from executor.map(work, items)
