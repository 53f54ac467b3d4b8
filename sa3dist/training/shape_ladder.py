"""Pads micro batches to few shapes: the packed list of tokens is filled up to the next of a ladder of sizes.

All lengths between two rungs then share one compiled program and one CUDA graph. The filling changes no result
(``model.packing.FilledPacking``).
"""

import dataclasses
import math

import torch.nn.functional as F

from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.model.packing import FilledPacking

# Ratio of neighbouring rungs: at most 12.5 % more tokens; 24 rungs up to a clip of 380 s.
FACTOR = 1.125
# The lowest rung: fewer tokens take as long.
LEAST_TOKENS = 256


def rung(tokens: int, longest: int) -> int:
    """The number of tokens that a list of ``tokens`` is filled up to.

    longest   tokens of the run's longest clip: the top rung; the others follow by division by FACTOR
    """
    lowest = max(0, math.floor(math.log(longest / LEAST_TOKENS, FACTOR)))
    steps = min(lowest, math.floor(math.log(longest / tokens, FACTOR)))
    # The logarithm may be off by rounding at a rung: check its neighbours.
    near = (math.ceil(longest * FACTOR**-step) for step in range(steps + 1, steps - 3, -1) if step <= lowest)
    return next(size for size in near if size >= tokens)


class ShapeLadder:
    """Fills micro batches up to the ladder's sizes."""

    def __init__(self, frames: int, memory: int) -> None:
        """frames: of the run's longest crop; memory: memory tokens before each clip's frames."""
        self.frames, self.memory = frames, memory

    def __call__(self, batch: MicroBatch) -> MicroBatch:
        """The micro batch with all tensors in a rung's shape, on the same device."""
        clips, _, frames = batch.noised_BDT.shape
        lengths = (frames,) * clips if batch.packing is None else batch.packing.lengths
        self.frames = max(self.frames, frames)
        tokens = clips * self.memory + sum(lengths)
        longest = self.memory + self.frames
        filled = min(rung(tokens, longest), clips * longest)
        device = batch.noised_BDT.device
        packing = FilledPacking.of(lengths, self.memory, self.frames, filled)
        if device.type == "cuda":
            packing = packing.pin_memory().to(device, non_blocking=True)
        # Prompts get their full length: each prompt length would otherwise need a program of its own.
        positions = batch.hidden_BLH.shape[1]
        short = (batch.prompt_length or positions) - positions
        keep_BT = batch.keep_BT
        if keep_BT is None:
            keep_BT = batch.noised_BDT.new_ones(clips, frames, dtype=bool)
        behind = (0, self.frames - frames)
        padded = {
            name: F.pad(getattr(batch, name), behind)
            for name in ("latents_BDT", "noised_BDT", "target_BDT", "inpaint_mask_B1T")
        }
        return dataclasses.replace(
            batch,
            **padded,
            keep_BT=F.pad(keep_BT, behind),
            hidden_BLH=F.pad(batch.hidden_BLH, (0, 0, 0, short)),
            prompt_mask_BL=F.pad(batch.prompt_mask_BL, (0, short)),
            packing=packing,
        )
