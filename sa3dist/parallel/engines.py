"""From the losses of micro batches to the adapters' next values: one interface, one engine per parallel mode.

Engines train. Steps, learning rates, order of clips and the checkpoint's format are the loop's in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from sa3dist.parallel.flat import FlatAdapters
from sa3dist.parallel.group import Group

Tensors = dict[str, Tensor]
# (loss, loss_gen, loss_ctx) of one micro batch.
Losses = tuple[Tensor, Tensor, Tensor]


class Engine(Protocol):
    """One rank's hold on the adapters; every method but ``losses`` and ``backward`` is called by all ranks alike.

    parameters   the trained tensors by their name in a file; under ZeRO-3 a rank holds only its part of their values
    scalars      float32 sums that ``average`` adds up over the ranks
    """

    parameters: dict[str, nn.Parameter]
    scalars: Tensor

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

    def state(self) -> tuple[Tensors, dict[str, Tensors]]:
        """Whole adapters and moments by name, float32 copies on the CPU of every rank."""

    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        """Take over what ``state`` of any engine gave after ``step`` optimiser steps."""


class FlatEngine:
    """One process, or data parallel ranks that hold everything: one optimiser kernel and one all-reduce per step."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], forward: Callable[..., Losses], settings, group: Group, scalars: int
    ) -> None:
        """forward: losses of a micro batch; scalars: how many travel along; settings give rate and weight decay."""
        self.parameters = parameters
        self.losses = forward
        self.group = group
        self.flat = FlatAdapters(parameters, settings.learning_rate, settings.weight_decay, scalars)
        self.scalars = self.flat.scalars

    def zero(self) -> None:
        self.flat.zero()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def average(self) -> Tensor:
        self.flat.average(self.group)
        return torch.linalg.vector_norm(self.flat.gradient)

    def step(self, learning_rate: float) -> None:
        self.flat.optimizer.param_groups[0]["lr"] = learning_rate
        self.flat.optimizer.step()

    def state(self) -> tuple[Tensors, dict[str, Tensors]]:
        return self.flat.state()

    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        self.flat.restore(adapters, moments, step)
