"""What one run has to do, and how it is divided over steps, ranks and micro batches."""

from __future__ import annotations

import dataclasses
from typing import Any

from sa3dist.data.batches.order import ClipOrder
from sa3dist.training.lr_schedule import Schedule


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """How one run divides its work.

    accumulation    micro batches per rank and step
    global_batch    clips per step over all ranks
    identity        what a checkpoint must agree with to be continued: JSON values by name
    clip_keys       keys of the dataset's clips, in index order; empty where a stream has no index
    order           which of them each slot trains on; None = the plain shuffle
    schedule        the learning rate of each step; None = the settings' learning_rate throughout
    description     what config.json says of the run beside the step; kept with every checkpoint for an offline export
    adapt_memory    ``on_oom: adapt``: after a step that runs out of memory the next start recomputes blocks
    out_of_memory_at_step   the step in which an earlier start of this run, with adapt_memory, ran out of memory: every
                    block is recomputed since; None = none did
    """

    steps: int
    accumulation: int
    micro_batch: int
    global_batch: int
    seed: int
    identity: dict[str, Any]
    clip_keys: list[str]
    order: ClipOrder | None = None
    schedule: Schedule | None = None
    description: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapt_memory: bool = False
    out_of_memory_at_step: int | None = None

    def clips_of_step(self, step: int) -> list[str]:
        """Keys of the clips all ranks train on in a step, in slot order."""
        slots = range((step - 1) * self.global_batch, step * self.global_batch)
        order = self.order or ClipOrder(self.seed, len(self.clip_keys))
        return [self.clip_keys[order.clip_of_slot(slot)] for slot in slots]
