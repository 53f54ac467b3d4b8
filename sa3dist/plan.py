"""What a run needs of its machine: memory for activations, and whether blocks must be recomputed to fit."""

from __future__ import annotations

import logging
from typing import Any

import psutil
import torch

log = logging.getLogger(__name__)

# Widths of activation kept per token and block for the backward pass: 65 and 92 by saved-tensor hooks on the released
# block shapes, and a margin; see tests/test_plan.py::test_the_estimate_bounds_the_measured_activations.
SAVED_WIDTHS_PLAIN = 70
SAVED_WIDTHS_DIFFERENTIAL = 98
# The rest is for gradients in flight and the allocator's rounding.
USABLE_SHARE = 0.8


def activation_bytes(base, frames: int, clips: int, value_bytes: int) -> int:
    """Bytes one micro batch keeps for its backward pass when no block is recomputed."""
    dit = base.config.dit
    widths = SAVED_WIDTHS_DIFFERENTIAL if dit.attn_kwargs.differential else SAVED_WIDTHS_PLAIN
    tokens = clips * (frames + dit.num_memory_tokens)
    return tokens * dit.depth * widths * dit.embed_dim * value_bytes


def free_bytes(device: torch.device) -> int:
    """Memory a process could still take on the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def wants_checkpointing(choice: str, base, frames: int, clips: int, device: torch.device) -> bool:
    """Whether to recompute blocks in the backward pass: as told, or with ``auto`` when the estimate does not fit."""
    if choice != "auto":
        return choice == "on"
    needed = activation_bytes(base, frames, clips, value_bytes=2 if base.dtype != torch.float32 else 4)
    free = free_bytes(device)
    recompute = needed > USABLE_SHARE * free
    log.info(
        "activations need about %.1f GB, %.1f GB are free: gradient checkpointing %s",
        needed / 1e9,
        free / 1e9,
        "on" if recompute else "off",
    )
    return recompute


def memory_figures(device: torch.device) -> dict[str, Any]:
    """Peak memory of this process, for metrics.jsonl."""
    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(device)}
    import resource

    # Linux counts the peak resident set in kilobytes.
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
