"""From the losses of micro batches to the adapters' next values: one interface, one engine per parallel mode.

Engines train. Steps, learning rates, order of clips and the checkpoint's format are the loop's in every mode.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from sa3dist_kernels import FormedWeights
from torch import Tensor, nn

from sa3dist.adapters import adapted_layers
from sa3dist.adapters.formed import keep_formed
from sa3dist.parallel.flat_adamw import FlatAdapters
from sa3dist.parallel.gradient_buckets import GradientReduction
from sa3dist.runtime.process_group import Group
from sa3dist.training.rank_checks import step_alike

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
# (loss, loss_gen, loss_ctx) of one micro batch.
Losses = tuple[Tensor, Tensor, Tensor]


class Engine(Protocol):
    """One rank's hold on the adapters; every method but ``losses`` and ``backward`` is called by all ranks alike.

    parameters   the trained tensors by their name in a file; under ZeRO-3 a rank holds only its part of their values
    scalars      float32 sums that ``average`` adds up over the ranks
    lockstep     ranks exchange tensors within the passes: one that fails there cannot join its peers afterwards
    formed       the weights the adapted layers multiply with, where they are kept for whole steps; None: factored form
    separate     in lockstep, but ``losses`` and ``gradients`` exchange nothing; ``add``, in place of ``backward``, does
    """

    parameters: dict[str, nn.Parameter]
    scalars: Tensor
    lockstep: bool
    separate: bool
    formed: FormedWeights | None

    def zero(self) -> None:
        """Forget the gradients and scalars of the step before."""

    def losses(self, batch) -> Losses:
        """The forward pass of one micro batch."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss. last: no other micro batch of this step follows on this rank."""

    def average(self) -> Tensor:
        """Mean of gradients and sum of scalars over all ranks; returns the mean gradient's norm, of shape ()."""

    def step(self, learning_rate: float) -> None:
        """One AdamW step with the averaged gradients."""

    def adapters(self) -> Tensors:
        """Whole tensors by name, float32 copies on the CPU of every rank."""

    def moments(self) -> dict[str, Tensors]:
        """AdamW's running means of every tensor, likewise; after at least one step."""

    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        """Take over what any engine's ``adapters`` and ``moments`` gave after ``step`` optimiser steps."""


def make(
    base,
    parameters: dict[str, nn.Parameter],
    forward: Callable[..., Losses],
    settings,
    work,
    group: Group,
    scalars: int,
) -> Engine:
    """The engine of the mode this process was launched in.

    forward   (batch) to its losses        scalars   how many float32 values travel with the gradients
    settings  learning_rate, weight_decay, gradient_compression, adapter_products, mixed_precision
    work      micro_batch, accumulation, adapt_memory
    """
    share_initial_state(base, parameters, group)
    if group.deepspeed is None:
        return FlatEngine(base, parameters, forward, settings, group, scalars)
    # DeepSpeed is imported where it is used: most runs do without it.
    from sa3dist.parallel import zero_config
    from sa3dist.parallel.zero import ZeroEngine

    compression = settings.gradient_compression
    config = zero_config.build(group.deepspeed, work.micro_batch, work.accumulation, group.world_size, compression)
    return ZeroEngine(base, parameters, forward, settings, config, group, scalars, separate=work.adapt_memory)


@torch.no_grad()
def share_initial_state(base, parameters: dict[str, nn.Parameter], group: Group) -> None:
    """Give every rank rank 0's adapters, and the frozen constants they act with.

    Both come out of norms and singular vectors, whose last bits, and signs, differ between kinds of CPU.
    """
    for parameter in parameters.values():
        group.broadcast_(parameter.data)
    for layer in adapted_layers(base).values():
        for constant in layer.adapter.buffers():
            group.broadcast_(constant)


class FlatEngine:
    """One process, or data parallel ranks that hold everything: one optimiser kernel and one all-reduce per step."""

    lockstep = False
    separate = False

    def __init__(
        self,
        base,
        parameters: dict[str, nn.Parameter],
        forward: Callable[..., Losses],
        settings,
        group: Group,
        scalars: int,
    ) -> None:
        """forward: losses of a micro batch; scalars: how many travel along; settings as for ``make``."""
        self.parameters = parameters
        self.losses = forward
        # The conditioners are the last modules, yet the last to have their gradients.
        backward_order = sorted(parameters, key=lambda name: not name.startswith("conditioners."))
        ordered = {name: parameters[name] for name in backward_order}
        self.flat = FlatAdapters(ordered, settings.learning_rate, settings.weight_decay, scalars)
        self.scalars = self.flat.scalars
        self.formed = keep_formed(base, self.flat, settings, group.device)
        self.reduction = GradientReduction(self.flat, group, settings.gradient_compression)
        self.group = group
        self.alike = step_alike(group)
        if not self.alike and group.is_main:
            log.info("the ranks' processors round AdamW steps differently; all take over rank 0's after every step")

    def zero(self) -> None:
        self.flat.zero()
        self.reduction.reset()
        if self.formed is not None:
            self.formed.form()

    def backward(self, loss: Tensor, last: bool) -> None:
        if last:
            self.reduction.arm()
        loss.backward()

    def average(self) -> Tensor:
        self.reduction.finish()
        if self.formed is not None:
            # Linear in what was summed up: once, after all micro batches and ranks.
            self.formed.finish()
        return torch.linalg.vector_norm(self.flat.gradient)

    def step(self, learning_rate: float) -> None:
        self.flat.optimizer.param_groups[0]["lr"] = learning_rate
        self.flat.optimizer.step()
        if not self.alike:
            self.group.broadcast_(self.flat.values.data)

    def adapters(self) -> Tensors:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, Tensors]:
        return self.flat.state()[1]

    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        self.flat.restore(adapters, moments, step)
