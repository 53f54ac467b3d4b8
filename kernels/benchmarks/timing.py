"""Medians of interleaved runs: variants run in turn, so that a busy or warming machine slows all alike."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Larger than the last-level cache of any device in use (H200: 60 MB), so that timed calls read operands from memory, as
# layers do in a model whose weights do not fit in the cache.
FLUSH_BYTES = 256 << 20


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], Any], device: torch.device, flush: torch.Tensor | None = None) -> float:
    """Time of one call: by CUDA events, or by the wall clock on a CPU.

    flush   device memory to overwrite first, untimed
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    if flush is not None:
        flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(
    variants: dict[str, Callable[[], Any]], rounds: int, device: torch.device, warm_up: int = 1, cold: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of each variant, ``rounds`` times each, in turn, after ``warm_up`` rounds.

    cold   overwrite the device's cache before each timed call
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if cold and device.type == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warm_up + rounds):
        for name, run in variants.items():
            spent = milliseconds(run, device, flush)
            if round_ >= warm_up:
                times[name].append(spent)
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of tensors during ``run``, beyond what was allocated before."""
    if device.type != "cuda":
        return _host_peak_bytes(run)
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    allocated = torch.cuda.memory_allocated(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - allocated


def _host_peak_bytes(run: Callable[[], Any]) -> int:
    """From the profiler's allocation events: the CPU allocator has no statistics."""
    with warnings.catch_warnings():
        # The profiler warns when started several times in a process.
        warnings.simplefilter("ignore", UserWarning)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
            run()
    allocations = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in allocations), initial=0))
