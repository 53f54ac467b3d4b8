"""Records what a function launches on a CUDA device as a graph, if memory allows, and cleans up when that fails."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import torch

from sa3dist.cost_model.devices import free_bytes

Tensors = tuple[torch.Tensor, ...]
# Free memory needed before a recording, in passes: the recorded one, an ordinary one, and the allocator's rounding.
PASSES_THAT_FIT = 2.2


class Recorder:
    """Records functions on a stream of its own.

    Recordings never run at the same time, so their temporary values share one memory pool.
    """

    def __init__(self, device: torch.device, largest_pass_bytes: float = 0.0) -> None:
        """largest_pass_bytes: of any later pass, as far as known"""
        self._largest_pass_bytes = largest_pass_bytes
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:
        """Run ``function`` on the recording stream: compiles and chooses kernels, and allocates their workspaces."""
        # A gradient's last node keeps the stream of the pass that made it: none of an earlier pass may survive.
        gc.collect()
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return function()
        finally:
            # Also after running out of memory: kernels already launched still add to gradients.
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], Tensors]) -> Callable[[], Tensors]:
        """Record what ``function`` launches, without running it. The returned function replays it.

        Each replay overwrites the tensors that the one before returned.
        Raises RuntimeError if an operation cannot be recorded, or too little memory would be left.
        """
        self._check_room()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        try:
            # thread_local: other threads meanwhile pin memory and watch collectives.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = function()
        except Exception:
            self._recover()
            raise
        finally:
            # A failed recording leaves its stream as the current one.
            torch.cuda.set_stream(current)

        def replay() -> Tensors:
            graph.replay()
            return results

        return replay

    def _recover(self) -> None:
        """Clean up after a failed recording.

        Otherwise torch 2.11 takes it to go on, and can neither empty its cache nor draw random numbers on the device.

        Source: pytorch/pytorch#180395; and #190348 for the memory, which only a complete recording releases by itself.
        """
        place = self._stream.device.index, self._pool
        # The first call raises if the recording itself has ended the allocation.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(*place)
            torch._C._cuda_releasePool(*place)
        # Only a successful recording resets the generator's recording state: record something.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=self._stream.device)

    def _check_room(self) -> None:
        """Raise RuntimeError unless a recording leaves room for an ordinary pass, which other shapes still need."""
        device = self._stream.device
        torch.cuda.empty_cache()
        # The highest peak above what is allocated now; longer clips may still follow.
        found = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        one_pass = max(found, self._largest_pass_bytes)
        # Counts what earlier recordings hold as free: the next one reuses it.
        free = free_bytes(device)
        if free < PASSES_THAT_FIT * one_pass:
            raise RuntimeError(
                f"{free / 1e9:.1f} GB are too little for a recorded pass and an ordinary one of {one_pass / 1e9:.1f} GB"
            )
