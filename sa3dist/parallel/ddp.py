"""Data parallel training, and training in one process: every rank holds all adapters, gradients and moments."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sa3dist.adapters.formed import use_formed_weights
from sa3dist.model.checkpoint import tensors_digest
from sa3dist.parallel.engine import Losses, Result, Tensors
from sa3dist.parallel.flat_adamw import FlatAdamW, FlatGradients
from sa3dist.parallel.gradient_buckets import GradientReduction

if TYPE_CHECKING:
    from sa3dist.model.base import Base
    from sa3dist.runtime.process_group import Group
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)

# For the trial that compares processors; the odd count also tests the remainder loop of vector kernels.
TRIAL_STEPS, TRIAL_ELEMENTS = 3, 4099


class FlatEngine:
    """An ``Engine`` whose ranks hold everything: one optimiser kernel per step; one all-reduce or a few buckets."""

    collectives_in_forward = divided = False
    # True: each rank steps all values. False: each steps a part, they exchange it, and so hold equal bits.
    steps_whole = True

    def __init__(
        self,
        base: Base,
        parameters: dict[str, nn.Parameter],
        flat: FlatGradients,
        forward: Callable[..., Losses],
        settings: Settings,
        group: Group,
    ) -> None:
        """flat: holds ``parameters`` in backward order; forward: losses of a micro batch; settings as for ``build``."""
        self.parameters, self.flat = parameters, flat
        self.losses = forward
        self.scalars, self.gradient = flat.scalars, flat.gradient
        self.add_gradients = flat.add_gradients
        self.formed = use_formed_weights(base, flat, settings, group.device)
        self.reduction = GradientReduction(flat, group, settings.gradient_compression)
        self.group = group
        self.alike = not self.steps_whole or step_alike(group)
        # Not if values are exchanged after a step: a rank that has failed would not take part.
        self.steps_ahead = self.steps_whole and self.alike
        self._formed_ahead = False
        if not self.alike and group.is_main:
            log.info("the ranks' processors round AdamW steps differently; all take over rank 0's after every step")

    def evaluate(self, work: Callable[[], Result]) -> Result:
        return work()

    def whole(self, layer: nn.Module) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def zero(self) -> None:
        self.flat.zero()
        self.reduction.reset()
        if not self._formed_ahead:
            self._form()
        self._formed_ahead = False

    def form_ahead(self) -> None:
        self._form()
        self._formed_ahead = True

    def _form(self) -> None:
        if self.formed is not None:
            self.formed.form()

    def backward(self, loss: Tensor, last: bool) -> None:
        if last:
            self.reduction.begin_last_backward()
        loss.backward()

    def average(self) -> Tensor:
        self.reduction.finish()
        if self.formed is not None:
            # Finishing is linear in the sums: do it once, after all micro batches and ranks.
            self.formed.finish()
        return torch.linalg.vector_norm(self.flat.gradient)

    def step(self, learning_rate: float, skip: Tensor | None = None) -> None:
        self.flat.optimizer.learning_rate = learning_rate
        self.flat.step(skip)
        if not self.alike:
            self.group.broadcast_(self.flat.values)

    def adapters(self) -> Tensors:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, Tensors]:
        return self.flat.moments()

    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        self.flat.restore(adapters, moments, step)
        self._formed_ahead = False


def in_backward_order(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters, those with the last gradients of a backward pass first: the conditioners', the last modules."""
    return dict(sorted(parameters.items(), key=lambda item: not item[0].startswith("conditioners.")))


def step_alike(group: Group) -> bool:
    """Whether an AdamW step gives equal bits on all ranks for equal values and gradients; called on all ranks.

    Processors differ in whether they round a product before adding it. A trial shows that; a list of processors would
    not.
    """
    if group.world_size == 1:
        return True
    # Uniform draws have the same bits everywhere; normal ones do not.
    draws = (
        torch.rand(TRIAL_STEPS + 1, TRIAL_ELEMENTS, generator=torch.Generator().manual_seed(0)).to(group.device) - 0.5
    )
    values, gradient = draws[0].clone(), torch.empty_like(draws[0])
    optimizer = FlatAdamW(values, gradient, learning_rate=1e-3, weight_decay=0.01)
    for draw in draws[1:]:
        gradient.copy_(draw)
        optimizer.step()
    return len(set(group.gather(tensors_digest({"values": values})))) == 1
