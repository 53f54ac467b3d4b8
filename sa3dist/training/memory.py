"""What a step needs of a device's memory, and how many blocks must be recomputed so that it fits."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import torch

from sa3dist.adapters import adapted_layers, adapter_parameters
from sa3dist.cost_model.devices import free_bytes
from sa3dist.cost_model.flops import Adapter, Count, MicroBatch, count

if TYPE_CHECKING:
    from sa3dist.model.base import Base
    from sa3dist.model.config import ModelConfig

log = logging.getLogger(__name__)

# The rest is for the allocator's rounding and what is counted nowhere.
USABLE_SHARE = 0.9
# Values in flight at once while one block is differentiated, in widths per token beside the feed-forward's: gradients
# of its hidden values, the stream's, and of queries, keys and values.
WORKING_WIDTHS = 16
# AdamW's two moments, made in the first step; value and gradient of an adapter entry are there before. Float32.
MOMENT_BYTES, VALUE_BYTES = 8, 8


def batch_of(config: ModelConfig, frames: int, clips: int, given_context: bool = True) -> MicroBatch:
    """The largest micro batch a run can meet: full-length clips, context given, the whole prompt evaluated."""
    context = config.prompt.max_length + 1
    return MicroBatch((frames,) * clips, context, context, given_context)


def adapter_of(base: Base) -> Adapter:
    """The adapter attached to ``base``, as it is counted."""
    layers = adapted_layers(base)
    kind = next((layer.kind for layer in layers.values()), None)
    formed = any(layer.formed is not None for layer in layers.values())
    return Adapter(kind, base.adapter_config.rank if layers else 0, frozenset(layers), formed)


def working_bytes(config: ModelConfig, tokens: int, value_bytes: int) -> float:
    """Memory of the values that come and go within one block's backward pass."""
    dit = config.dit
    return tokens * dit.embed_dim * (WORKING_WIDTHS + 4 * dit.ff_kwargs.mult) * value_bytes


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many blocks are recomputed; what the step then needs beside what is in memory, and what is free, in bytes."""

    recomputed_blocks: int
    needed_bytes: float
    free_bytes: float

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= USABLE_SHARE * self.free_bytes


def fewest_recomputed(counted: Count, other_bytes: float, free_bytes: float) -> Choice:
    """The smallest number of recomputed blocks with which the step fits, or all of them."""
    depth = len(counted.blocks)
    for blocks in range(depth + 1):
        choice = Choice(blocks, other_bytes + counted.kept_bytes(blocks), free_bytes)
        if choice.fits:
            break
    return choice


def recomputed_blocks(
    choice: str, base: Base, frames: int, clips: int, device: torch.device, mixed_precision: str
) -> int:
    """Blocks to recompute in the backward pass: all with ``on``, none with ``off``, as few as fit with ``auto``.

    frames, clips   of the largest micro batch. The base is loaded and the adapter attached: only the rest must fit.
    """
    depth = base.config.dit.depth
    if choice != "auto":
        return depth if choice == "on" else 0
    counted, working = largest_pass(base, frames, clips, device, mixed_precision)
    trained = sum(parameter.numel() for parameter in adapter_parameters(base).values())
    picked = fewest_recomputed(counted, working + MOMENT_BYTES * trained, free_bytes(device))
    log.info(
        "gradient checkpointing auto: %d of %d blocks recomputed, a step needs about %.1f GB of %.1f GB free%s",
        picked.recomputed_blocks,
        depth,
        picked.needed_bytes / 1e9,
        picked.free_bytes / 1e9,
        "" if picked.fits else "; it may run out of memory: lower batch_size or duration",
    )
    return picked.recomputed_blocks


def largest_pass(
    base: Base, frames: int, clips: int, device: torch.device, mixed_precision: str
) -> tuple[Count, float]:
    """What the largest micro batch's pass counts, and the bytes of what comes and goes in it beside what is kept."""
    value_bytes = 4 if base.dtype == torch.float32 else 2
    counted = count(base.config, batch_of(base.config, frames, clips), adapter_of(base), value_bytes, value_bytes)
    tokens = clips * (frames + base.config.dit.num_memory_tokens)
    return counted, working_bytes(base.config, tokens, value_bytes)


def largest_pass_bytes(base: Base, frames: int, clips: int, device: torch.device, mixed_precision: str) -> float:
    """Memory that pass takes beside what stays between steps, with as many recomputed blocks as ``base`` has now."""
    counted, working = largest_pass(base, frames, clips, device, mixed_precision)
    return working + counted.kept_bytes(base.recomputed_blocks)


def memory_figures(device: torch.device) -> dict[str, Any]:
    """Peak memory of this process, for metrics.jsonl: in use, and on CUDA what the device had to hand out for it."""
    if device.type == "cuda":
        # Recorded passes hold memory that counts as free to the allocator, yet is nobody else's.
        reserved = torch.cuda.max_memory_reserved(device)
        return {"peak_bytes": torch.cuda.max_memory_allocated(device), "reserved_bytes": reserved}
    import resource

    # Linux counts the peak resident set in kilobytes.
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
