"""The interface of an engine: from the losses of micro batches to the adapters' next values.

There is one engine per parallel mode. Engines train; steps, learning rates, the order of clips and the checkpoint's
format belong to the trainer in every mode. A new engine is a module here with a class that implements ``Engine``, and a
line in ``build.make``. If a launcher has to ask for it, ``runtime.process_group.connect`` records that in ``Group``.
"""

import contextlib
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor, nn

from sa3dist.adapters.formed import Formed
from sa3dist.data.batches.micro_batch import MicroBatch

Result = TypeVar("Result")
Tensors = dict[str, Tensor]
# The losses of one micro batch by name, each of shape (); "loss" is the trained one.
Losses = dict[str, Tensor]


class Engine(Protocol):
    """One rank's share of the training. All ranks call each method, except ``losses``, ``evaluate`` and ``backward``.

    parameters   the trained tensors by their name in a file; under ZeRO-3 a rank holds only its part of their values
    scalars      float32 sums, which ``zero`` sets to zero and ``average`` adds up over the ranks
    gradient     one flat tensor, to which a pass recorded as a CUDA graph adds its gradients; None: cannot be recorded
    formed       the formed weights that the adapted layers multiply with; None: factored form
    collectives_in_forward   ranks exchange tensors within forward and backward passes: a rank that fails there cannot
                 join its peers in ``average``, and a pass cannot be recorded as a CUDA graph
    steps_ahead  ``step`` can be launched before the host knows the sums; the device then decides whether to take it
    divided      a rank holds only a part of the base: it can be evaluated only within ``evaluate``, and a layer read
                 only within ``whole``
    """

    parameters: dict[str, nn.Parameter]
    scalars: Tensor
    gradient: Tensor | None
    formed: Formed | None
    collectives_in_forward: bool
    steps_ahead: bool
    divided: bool

    def zero(self) -> None:
        """Clear the gradients and scalars of the previous step."""

    def losses(self, batch: MicroBatch) -> Losses:
        """The forward pass of one micro batch."""

    def evaluate(self, work: Callable[[], Result]) -> Result:
        """Call ``work``, which evaluates the base; on all ranks with the same modules if they hold parts."""

    def whole(self, layer: nn.Module) -> contextlib.AbstractContextManager:
        """Inside this context, entered by all ranks, this rank can read all of an adapted layer's tensors."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss. last: this rank's last micro batch of the step."""

    def average(self) -> Tensor:
        """Average the gradients and sum the scalars over all ranks; returns the mean gradient's norm, of shape ()."""

    def step(self, learning_rate: float, skip: Tensor | None = None) -> None:
        """One AdamW step with the averaged gradients.

        skip   only with ``steps_ahead``: float32 of shape (), equal on all ranks; 1 = change nothing
        """

    def form_ahead(self) -> None:
        """Only with ``steps_ahead``: form now, with the stepped adapters, what the next ``zero`` would form."""

    def adapters(self) -> Tensors:
        """Whole tensors by name, float32 copies on the CPU of every rank."""

    def moments(self) -> dict[str, Tensors]:
        """The optimiser's state of every tensor, by kind (``flat_adamw.MOMENTS``); after at least one step."""

    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        """Load the ``adapters`` and ``moments`` that any engine returned after ``step`` optimiser steps."""
