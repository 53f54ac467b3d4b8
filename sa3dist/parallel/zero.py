"""DeepSpeed ZeRO: moments, gradients and, at stage 3, the base and the adapters divided over the ranks.

DeepSpeed moves tensors between ranks and calls AdamW on each rank's part. What is trained, at which rate and in which
precision is decided outside of it, and the whole state can be had, and given back, at any step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional

from sa3dist.parallel.engine import Losses, Result, Tensors
from sa3dist.parallel.flat_adamw import MOMENTS, adamw

if TYPE_CHECKING:
    from sa3dist.adapters.layers import AdaptedLayer
    from sa3dist.data.batches.micro_batch import MicroBatch
    from sa3dist.model.base import Base
    from sa3dist.runtime.process_group import Group
    from sa3dist.settings import Settings

# Of the values that AdamW steps, and of its moments.
SET_WHOLE = safe_set_full_fp32_param, safe_set_full_optimizer_state
SET_PART = safe_set_local_fp32_param, safe_set_local_optimizer_state


class Roots(nn.Module):
    """What DeepSpeed sees: the trained roots of the base as children, and what is done with them as a forward pass.

    The autoencoder and the text encoder are left out: they work outside of the step, on ranks of their own.
    """

    def __init__(self, base: Base):
        super().__init__()
        self.roots = nn.ModuleList(base.adapter_roots)

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()


class ZeroEngine:
    """An ``engine.Engine`` over a DeepSpeed engine of stage 1, 2 or 3."""

    collectives_in_forward = True
    formed = gradient = None

    def __init__(
        self,
        base: Base,
        layers: Collection[AdaptedLayer],
        parameters: dict[str, nn.Parameter],
        forward: Callable[..., Losses],
        settings: Settings,
        config: dict[str, Any],
        group: Group,
        scalars: int,
    ) -> None:
        """config: what ``zero_config.build`` made of the launcher's file; the rest as for ``build.make``."""
        self.parameters, self._forward = parameters, forward
        self.group = group
        self.scalars = torch.zeros(scalars, device=group.device)
        self.divided = config["zero_optimization"]["stage"] == 3
        for layer in layers:
            for parameter in layer.trained().values():
                # A child's tensors, read by the layer itself: stage 3 has to gather them with the layer's own.
                deepspeed.zero.register_external_parameter(layer, parameter)
        # Some versions of DeepSpeed take a step when they begin: at a rate of zero nothing moves.
        optimizer = adamw(parameters.values(), 0.0, settings.weight_decay)
        self.engine, *_ = deepspeed.initialize(
            model=Roots(base), optimizer=optimizer, config=config, dist_init_required=False
        )
        assert self.engine.gradient_clipping() == 0
        self._make_moments()

    @property
    def _parts(self) -> list[Tensor]:
        """This rank's parts of the adapters, flat, as AdamW steps them."""
        optimizer = self.engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.divided else optimizer.single_partition_of_fp32_groups

    def _make_moments(self) -> None:
        """AdamW's state as after zero steps. Made here, because ``restore`` needs a place to write to."""
        for part in self._parts:
            moments = {moment: torch.zeros_like(part) for moment in MOMENTS}
            self._adamw_state[part] = {"step": torch.zeros((), device=part.device), **moments}
            assert part.dtype == torch.float32
        if not self.divided:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _adamw_state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self.engine.optimizer.optimizer.state

    def zero(self) -> None:
        self.scalars.zero_()

    def losses(self, batch: MicroBatch) -> Losses:
        return self.evaluate(partial(self._forward, batch))

    def evaluate(self, work: Callable[[], Result]) -> Result:
        return self.engine(work)

    def whole(self, layer: nn.Module) -> contextlib.AbstractContextManager:
        return deepspeed.zero.GatheredParameters(list(layer.parameters()), enabled=self.divided)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # The loss comes divided by the accumulation.
        self.engine.backward(loss, scale_wrt_gas=False)

    def _gradients(self) -> list[Tensor]:
        """This rank's parts of the mean gradient; with the optimiser's state on the CPU they are there."""
        if self.engine.zero_cpu_offload():
            return [part.grad for part in self._parts]
        return [gradient for parts in self.engine.optimizer.averaged_gradients.values() for gradient in parts]

    def average(self) -> Tensor:
        """DeepSpeed averages within the backward pass; what is left is the norm, reduced with the scalars."""
        gradients = self._gradients()
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
        summed = self.group.sum_(torch.cat([self.scalars, norms.square().sum()[None].to(self.scalars.device)]))
        self.scalars.copy_(summed[:-1])
        return summed[-1].sqrt()

    def step(self, learning_rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def adapters(self) -> Tensors:
        # Before stage 3 every rank's own copy: it is what the ranks are compared by.
        whole = safe_get_full_fp32_param if self.divided else torch.Tensor.detach
        return {name: whole(parameter).cpu().clone() for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, Tensors]:
        return {
            moment: {
                name: safe_get_full_optimizer_state(parameter, moment).cpu().clone()
                for name, parameter in self.parameters.items()
            }
            for moment in MOMENTS
        }

    @torch.no_grad()
    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        # What is written to them stays, as rank 0 wrote it.
        with deepspeed.zero.GatheredParameters(list(self.parameters.values()), modifier_rank=0, enabled=self.divided):
            for name, parameter in self.parameters.items():
                parameter.copy_(adapters[name])
        for name, parameter in self.parameters.items():
            self._set_part(parameter, adapters[name])
            for moment in MOMENTS:
                self._set_part(parameter, moments[moment][name], moment)
        for state in self._adamw_state.values():
            state["step"].fill_(step)

    def _set_part(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Write what this rank holds of a tensor: of the stepped values, or of a moment."""
        value, setters = value.to(self.group.device), SET_WHOLE
        if self.divided:
            # DeepSpeed's own division of a whole tensor fails where the last part is padded.
            size, setters = parameter.ds_tensor.numel(), SET_PART
            padded = functional.pad(value.flatten(), (0, size * self.group.world_size - value.numel()))
            value = padded.narrow(0, size * self.group.dist_rank, size)
        if moment is None:
            setters[0](parameter, value)
        else:
            setters[1](parameter, value, moment)
