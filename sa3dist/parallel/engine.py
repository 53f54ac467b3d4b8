"""What an engine must offer: from the losses of micro batches to the adapters' next values.

There is one engine per parallel mode. Engines train; steps, learning rates, the order of clips and the checkpoint's
format are the trainer's in every mode. A new engine is a module here with a class that fulfils ``Engine``, and a line
in ``build.make``; where a launcher has to ask for it, ``runtime.process_group.connect`` tells of it in ``Group``.
"""

import contextlib
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor, nn

from sa3dist.adapters.formed import Formed
from sa3dist.data.batches.micro_batch import MicroBatch

Result = TypeVar("Result")
Tensors = dict[str, Tensor]
# The losses of one micro batch by name, each of shape (); "loss" is the one that is trained.
Losses = dict[str, Tensor]


class Engine(Protocol):
    """One rank's hold on the adapters; all ranks call its methods alike, but ``losses``, ``evaluate`` and ``backward``.

    parameters   the trained tensors by their name in a file; under ZeRO-3 a rank holds only its part of their values
    scalars      float32 sums, set to zero by ``zero``, that ``average`` adds up over the ranks
    gradient     where a pass that is recorded as a CUDA graph adds its gradients, one flat tensor; None: not recorded
    formed       the weights the adapted layers multiply with, where they are formed; None: factored form
    collectives_in_forward   ranks exchange tensors within the forward and backward pass: a rank that fails there cannot
                 join its peers in ``average``, and a pass cannot be recorded as a CUDA graph
    steps_ahead  ``step`` can leave it to the device whether the step is taken: it is launched before the host knows
    divided      a rank holds a part of the base alone: only within ``evaluate`` can it be evaluated, and a layer only
                 within ``whole`` be read
    """

    parameters: dict[str, nn.Parameter]
    scalars: Tensor
    gradient: Tensor | None
    formed: Formed | None
    collectives_in_forward: bool
    steps_ahead: bool
    divided: bool

    def zero(self) -> None:
        """Forget the gradients and scalars of the step before."""

    def losses(self, batch: MicroBatch) -> Losses:
        """The forward pass of one micro batch."""

    def evaluate(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, which evaluates the base; the same modules on all ranks where they hold parts."""

    def whole(self, layer: nn.Module) -> contextlib.AbstractContextManager:
        """While it is entered, by all ranks alike, this rank can read all of an adapted layer's tensors."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss. last: no other micro batch of this step follows on this rank."""

    def average(self) -> Tensor:
        """Mean of gradients and sum of scalars over all ranks; returns the mean gradient's norm, of shape ()."""

    def step(self, learning_rate: float, skip: Tensor | None = None) -> None:
        """One AdamW step with the averaged gradients.

        skip   only with ``steps_ahead``: float32 of shape (), equal on all ranks; where it is 1 all stays as it was
        """

    def form_ahead(self) -> None:
        """Only with ``steps_ahead``: what the next ``zero`` would form, from what the step has made of the adapters."""

    def adapters(self) -> Tensors:
        """Whole tensors by name, float32 copies on the CPU of every rank."""

    def moments(self) -> dict[str, Tensors]:
        """What the optimiser keeps of every tensor, by kind (``flat_adamw.MOMENTS``); after at least one step."""

    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        """Take over what any engine's ``adapters`` and ``moments`` gave after ``step`` optimiser steps."""
