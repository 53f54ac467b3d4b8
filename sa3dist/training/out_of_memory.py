"""A step that runs out of memory is done again with every block recomputed, or told why that cannot help."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import torch

from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.errors import EnvironmentFailure, OutOfMemory
from sa3dist.runtime.exit_status import has_peers

log = logging.getLogger(__name__)


def recompute_from(step: int, base, device: torch.device, problem: OutOfMemory) -> None:
    """Recompute every block of ``base`` from here on, give back what is free, and say so."""
    base.gradient_checkpointing = True
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    log.warning("step %d: out of memory on %s; recomputing blocks from here on", step, place_of(problem))


def place_of(problem: OutOfMemory) -> str:
    if not has_peers():
        return "this machine"
    return "rank {} on {}".format(*problem.origin) if problem.origin else "this rank"


def beyond_recomputing(problem: OutOfMemory, step: int, micro_batch: int) -> EnvironmentFailure:
    """What ``on_oom: adapt`` ends with when blocks are recomputed already, or are not what fills the memory."""
    return EnvironmentFailure(
        f"step {step}: recomputing blocks is not enough to fit into memory, and batch_size ({micro_batch}) decides "
        f"what is trained, so on_oom: adapt can do no more; choose a shorter duration, a lower rank, or a smaller "
        f"batch_size and another output_dir ({_what_happened(problem)})"
    )


def within_an_exchange(problem: OutOfMemory, step: int) -> EnvironmentFailure:
    """What it ends with when this rank has failed while its peers waited for its tensors."""
    return EnvironmentFailure(
        f"step {step}: {_what_happened(problem)}; under ZeRO-3 ranks exchange tensors within the passes, and one that "
        f"fails there cannot do its step again, so on_oom: adapt can do nothing; run again with "
        f"gradient_checkpointing=on to continue from what was saved"
    )


def _what_happened(problem: OutOfMemory) -> str:
    """Without the advice behind it, which holds for other settings."""
    return str(problem).partition("; try ")[0]


def remembering(batches: Iterator[MicroBatch], taken: list[MicroBatch]) -> Iterator[MicroBatch]:
    """The same micro batches, each also put into ``taken``."""
    for batch in batches:
        taken.append(batch)
        yield batch
