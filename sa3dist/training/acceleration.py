"""How a run computes its steps: recomputed blocks, compilation, CUDA graphs, determinism."""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING

import torch

from sa3dist.errors import ConfigError
from sa3dist.flow.crops import crop_frames
from sa3dist.model.compiled import (
    compile_blocks,
    compile_elementwise,
    fall_back_on_failure,
    wants_compile,
)
from sa3dist.training import memory
from sa3dist.training.cuda_graphs import wants_graphs
from sa3dist.training.graph_recorder import Recorder
from sa3dist.training.shape_ladder import ShapeLadder

if TYPE_CHECKING:
    from sa3dist.model.base import Base
    from sa3dist.runtime.process_group import Group
    from sa3dist.settings import Settings
    from sa3dist.training.trainer import Trainer


log = logging.getLogger(__name__)


def check_choices(settings: Settings, group: Group) -> None:
    """Raises ConfigError for settings that the run's device or parallel mode does not support."""
    if settings.cuda_graphs == "on" and (group.device.type != "cuda" or group.divides_model):
        raise ConfigError("cuda_graphs: on needs a CUDA device, and no ZeRO-3; use cuda_graphs=auto")
    if group.divides_model and settings.adapter_products == "formed":
        raise ConfigError(
            "adapter_products: formed keeps the adapted weights of the whole base on every rank, which ZeRO-3 divides; "
            "use auto or per_use"
        )


def choose_acceleration(trainer: Trainer, settings: Settings, frames: int) -> None:
    """Choose for this device, the run's length and its longest crop; each choice of ``auto`` is logged.

    settings   batch_size, gradient_checkpointing, adapter_products, mixed_precision, compile, deterministic,
               cuda_graphs
    Raises ConfigError when told to compile without a compiler.
    """
    base, group, plan = trainer.base, trainer.group, trainer.plan
    compiled = wants_compile(settings.compile, group.device, plan.steps)
    exact = settings.deterministic
    if settings.compile == "auto" and group.device.type == "cuda":
        log.info("compile: auto chose %s", "on" if compiled else "off")
    formed = trainer.engine.formed
    whole_blocks = compiled and formed is not None
    largest = memory.LargestPass(base, frames, settings.batch_size, settings.mixed_precision, whole_blocks)
    # An earlier start of this run ran out of memory; see ``memory.ending``.
    choice = settings.gradient_checkpointing if plan.out_of_memory_at_step is None else "on"
    if formed is not None and formed.per_use:
        choice = "on"
    may_change = formed is not None and not formed.per_use and settings.adapter_products == "auto"
    form_per_use = functools.partial(formed.allocate, per_use=True) if may_change else None
    base.recomputed_blocks = memory.recomputed_blocks(choice, largest, group.device, form_per_use)
    if group.device.type == "cuda":
        # Forget the peak of encoding, and of memory that was freed since.
        torch.cuda.reset_peak_memory_stats(group.device)
    if formed is not None:
        trainer.ladder = ShapeLadder(frames, base.dit.transformer.memory)
    if compiled:
        if whole_blocks:
            compile_whole_blocks(base, settings)
        else:
            if exact:
                torch.use_deterministic_algorithms(True)
            compile_elementwise(base.dit, tokens=most_tokens(base, settings) if exact else None)
            if settings.compile == "auto" and not exact:
                fall_back_on_failure()
    # Collectives cannot be recorded.
    if trainer.engine.collectives_in_forward or not wants_graphs(settings.cuda_graphs, group.device, plan.steps):
        return
    if exact and formed is None:
        # A recorded pass computes its own norms, while micro batches of a step share them: rounding may differ.
        log.info("cuda_graphs: none of a deterministic run whose adapted weights are not formed")
        return
    trainer.record_graphs(Recorder(group.device, largest.bytes(base.recomputed_blocks)), exact)


def compile_whole_blocks(base: Base, settings: Settings, backend="inductor") -> None:
    """backend: of torch.compile. Compiled programs are cached under all compiler settings made here."""
    # A deterministic run ends with the compiler's error: a fallback that happens only sometimes would change bits.
    may_fail = settings.compile == "auto" and not settings.deterministic
    tokens = most_tokens(base, settings) if settings.deterministic else None
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)
    compile_blocks(base.dit, backend, whole=not may_fail, tokens=tokens)
    if may_fail:
        fall_back_on_failure()


def longest_frames(base: Base, settings: Settings) -> int:
    """Frames of the longest crop such a run can have, whatever its data set holds."""
    framing = base.sample_rate_hz, base.samples_per_frame
    return crop_frames(settings.duration, base.native_seconds, base.native_seconds, *framing)


def most_tokens(base: Base, settings: Settings) -> int:
    """Tokens of the largest micro batch such a run can have."""
    return settings.batch_size * (base.dit.transformer.memory + longest_frames(base, settings))


def make_deterministic() -> None:
    """Use only deterministic kernels from here on; an operator without one raises."""
    # cuBLAS reads the variable at its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # As use_deterministic_algorithms, which also tells the compiler and imports it for that: a second of every start.
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
