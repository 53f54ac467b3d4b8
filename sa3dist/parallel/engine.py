"""From the losses of micro batches to the adapters' next values: one interface, one engine per parallel mode.

Engines train. Steps, learning rates, order of clips and the checkpoint's format are the loop's in every mode.
"""

from __future__ import annotations

from typing import Protocol

from sa3dist_kernels import FormedWeights
from torch import Tensor, nn

Tensors = dict[str, Tensor]
# (loss, loss_gen, loss_ctx) of one micro batch.
Losses = tuple[Tensor, Tensor, Tensor]


class Engine(Protocol):
    """One rank's hold on the adapters; every method but ``losses`` and ``backward`` is called by all ranks alike.

    parameters   the trained tensors by their name in a file; under ZeRO-3 a rank holds only its part of their values
    scalars      float32 sums that ``average`` adds up over the ranks
    collectives_in_forward   ranks exchange tensors within the forward and backward pass: one that fails there cannot
                 join its peers afterwards
    formed       the weights the adapted layers multiply with, where they are kept for whole steps; None: factored form
    separate     with collectives_in_forward: ``losses`` and ``gradients`` exchange nothing; ``add``, in place of
                 ``backward``, does
    """

    parameters: dict[str, nn.Parameter]
    scalars: Tensor
    collectives_in_forward: bool
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
