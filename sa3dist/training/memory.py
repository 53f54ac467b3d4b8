"""Device memory of a step: how much it needs, how many blocks must be recomputed, how running out ends the run."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from sa3dist.adapters import adapted_layers
from sa3dist.cost_model.devices import free_bytes
from sa3dist.cost_model.fake_network import AdapterShape, BatchShape, FakeNetwork, Numerics
from sa3dist.cost_model.flops import Count
from sa3dist.errors import EnvironmentFailure, OutOfMemory, RecomputeOnRestart, SA3DistError
from sa3dist.model.base import Base
from sa3dist.model.config import ModelConfig
from sa3dist.training.run_plan import RunPlan

log = logging.getLogger(__name__)

# The rest covers the allocator's rounding and values not counted, such as norms shared by the passes of a step.
USABLE_SHARE = 0.9
# Values in flight while one block is differentiated, in widths per token, without the feed-forward's (its gated values,
# which are recomputed, and the gradients of these and of its hidden values): gradients of the residual stream, queries,
# keys and values, and 13 of outputs that wait for joint sums with the block's last layer.
WORKING_WIDTHS = 29


def working_bytes(config: ModelConfig, tokens: int, value_bytes: int) -> float:
    """Memory of the temporary values of one block's backward pass."""
    dit = config.dit
    return tokens * dit.embed_dim * (WORKING_WIDTHS + 5 * dit.ff_kwargs.mult) * value_bytes


@dataclasses.dataclass(frozen=True)
class Choice:
    """Number of recomputed blocks; bytes the step needs beside what is allocated, and bytes that are free."""

    recomputed_blocks: int
    needed_bytes: float
    free_bytes: float

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= USABLE_SHARE * self.free_bytes


def fewest_recomputed(counted: Count, other_bytes: float, free_bytes: float, least: int = 0) -> Choice:
    """The smallest number of recomputed blocks with which the step fits, or all blocks. least: lower bound."""
    for blocks in range(least, len(counted.blocks) + 1):
        choice = Choice(blocks, other_bytes + counted.saved_bytes(blocks), free_bytes)
        if choice.fits:
            break
    return choice


@dataclasses.dataclass(frozen=True)
class LargestPass:
    """The pass of the largest micro batch a run can have: full-length clips, the whole prompt, context given.

    frames, clips   of that micro batch
    compiled        whether whole blocks are compiled
    """

    base: Base
    frames: int
    clips: int
    mixed_precision: str
    compiled: bool = False

    @functools.cached_property
    def counted(self) -> Count:
        layers = adapted_layers(self.base)
        kind = next((layer.kind for layer in layers.values()), None)
        formed = any(layer.formed is not None for layer in layers.values())
        adapter = AdapterShape(kind, self.base.adapter_config.rank if layers else 0, frozenset(layers), formed)
        numerics = Numerics(self.base.dtype, self.mixed_precision == "bf16", self.compiled)
        network = FakeNetwork(self.base.config, adapter, numerics)
        return network.count(BatchShape(self.clips, self.frames, given_context=True), backward=False)

    @property
    def working_bytes(self) -> float:
        """Bytes of its temporary values."""
        tokens = self.clips * (self.frames + self.base.config.dit.num_memory_tokens)
        return working_bytes(self.base.config, tokens, self.base.dtype.itemsize)

    def bytes(self, recomputed_blocks: int) -> float:
        """Memory it takes beside what stays between steps."""
        return self.working_bytes + self.counted.saved_bytes(recomputed_blocks)


def recomputed_blocks(
    setting: str, largest: LargestPass, device: torch.device, form_per_use: Callable[[], None] | None = None
) -> int:
    """Number of blocks to recompute in the backward pass: all with ``on``, none with ``off``, the fewest that fit with
    ``auto``.

    Call it when the base, the adapter, the optimiser's state and formed weights are allocated: only the rest must fit.

    form_per_use   frees most of the formed weights' memory; called if the step does not fit even with all blocks
                   recomputed. None: there are none, or they must stay
    """
    depth = largest.base.config.dit.depth
    if setting == "off" or (setting == "on" and form_per_use is None):
        return depth if setting == "on" else 0
    picked = fewest_recomputed(
        largest.counted, largest.working_bytes, free_bytes(device), least=depth if setting == "on" else 0
    )
    if form_per_use is not None and not picked.fits:
        log.info("adapted weights take too much memory: from here on they are formed for every use of a block")
        form_per_use()
        picked = dataclasses.replace(picked, free_bytes=free_bytes(device))
    log.info(
        "gradient checkpointing %s: %d of %d blocks recomputed, a step needs about %.1f GB of %.1f GB free%s",
        setting,
        picked.recomputed_blocks,
        depth,
        picked.needed_bytes / 1e9,
        picked.free_bytes / 1e9,
        "" if picked.fits else "; it may run out of memory: lower batch_size or duration",
    )
    return picked.recomputed_blocks


def memory_figures(device: torch.device) -> dict[str, Any]:
    """Peak memory of this process for metrics.jsonl: in use, and on CUDA also reserved by the allocator."""
    if device.type == "cuda":
        # Memory of recorded passes counts as free to the allocator, but nobody else can use it: report the reserved
        # too.
        reserved = torch.cuda.max_memory_reserved(device)
        return {"peak_bytes": torch.cuda.max_memory_allocated(device), "reserved_bytes": reserved}
    import resource

    # Linux counts the peak resident set in kilobytes.
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def ending(problem: OutOfMemory, step: int, plan: RunPlan, recomputing_helps: bool) -> SA3DistError:
    """The error that ends the run: ``problem`` itself with ``on_oom: fail``.

    recomputing_helps   the blocks filled the memory, and not all of them were recomputed
    """
    if not plan.adapt_memory:
        return problem
    # Drop the advice at its end, which is for other settings.
    found = str(problem).partition("; try ")[0]
    if recomputing_helps:
        return RecomputeOnRestart(
            f"step {step}: {found}; state is as last saved, run the same command to continue with recomputed blocks"
        )
    return EnvironmentFailure(
        f"step {step}: recomputing blocks is not enough to fit into memory, and batch_size ({plan.micro_batch}) "
        f"decides what is trained, so on_oom: adapt can do no more; choose a shorter duration, a lower rank, or "
        f"a smaller batch_size and another output_dir ({found})"
    )
