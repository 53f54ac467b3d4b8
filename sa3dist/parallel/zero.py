"""DeepSpeed ZeRO: the optimiser and, at stage 3, the base and the adapters divided over the ranks.

DeepSpeed calls AdamW on each rank's part and moves tensors between ranks. Objective, learning rate and precision are
decided outside of it, and the whole state can be read and restored at any step. At stages 1 and 2 the passes and the
mean of the gradients are those of data parallel training: DeepSpeed only takes the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable
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

from sa3dist.parallel.ddp import FlatEngine
from sa3dist.parallel.engine import Losses, Result, Tensors
from sa3dist.parallel.flat_adamw import BETAS, EPSILON, MOMENTS, FlatGradients
from sa3dist.parallel.zero_blocks import form_by_block

if TYPE_CHECKING:
    from sa3dist.adapters.layers import AdaptedLayer
    from sa3dist.data.batches.micro_batch import MicroBatch
    from sa3dist.model.base import Base
    from sa3dist.runtime.process_group import Group
    from sa3dist.settings import Settings


class Roots(nn.Module):
    """The module that DeepSpeed sees: trained roots of the base as children, and any work on them as its forward pass.

    Autoencoder and text encoder are excluded: they work outside of the step, on single ranks.
    ``gathered`` are modules that the roots call but do not contain.
    """

    def __init__(self, base: Base, gathered: Iterable[nn.Module]):
        super().__init__()
        self.roots, self.gathered = nn.ModuleList(base.adapter_roots), nn.ModuleList(gathered)

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()


def initialize(
    base: Base,
    parameters: Iterable[nn.Parameter],
    settings: Settings,
    config: dict[str, Any],
    gathered: Iterable[nn.Module] = (),
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine for the configuration that ``zero_config.build`` returned. gathered: see ``Roots``."""
    # Some versions of DeepSpeed take a step when they start: at a learning rate of zero nothing changes.
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=settings.weight_decay, fused=True
    )
    roots = Roots(base, gathered)
    engine, *_ = deepspeed.initialize(model=roots, optimizer=optimizer, config=config, dist_init_required=False)
    assert engine.gradient_clipping() == 0
    engine.set_gradient_accumulation_boundary(True)
    return engine


def make_moments(engine: deepspeed.DeepSpeedEngine, parts: list[Tensor]) -> None:
    """Allocate AdamW's state for a rank's ``parts``, as after zero steps, so that ``restore`` can write to it."""
    for part in parts:
        moments = {moment: torch.zeros_like(part) for moment in MOMENTS}
        engine.optimizer.optimizer.state[part] = {"step": torch.zeros((), device=part.device), **moments}
        assert part.dtype == torch.float32


def step(engine: deepspeed.DeepSpeedEngine, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.step()


def moments(parameters: dict[str, nn.Parameter]) -> dict[str, Tensors]:
    return {
        moment: {
            name: safe_get_full_optimizer_state(parameter, moment).cpu().clone()
            for name, parameter in parameters.items()
        }
        for moment in MOMENTS
    }


def set_steps(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(steps)


class DividedOptimizer(FlatEngine):
    """An ``Engine`` of stage 1 or 2: data parallel training where each rank steps a part and the ranks exchange it.

    DeepSpeed does not see the passes, so they can be recorded and weights formed. Both stages keep whole gradients on
    every rank.
    """

    steps_whole = False

    def __init__(
        self,
        base: Base,
        parameters: dict[str, nn.Parameter],
        ordered: dict[str, nn.Parameter],
        forward: Callable[..., Losses],
        settings: Settings,
        config: dict[str, Any],
        group: Group,
        scalars: int,
    ) -> None:
        """ordered: the parameters in backward order; config: see ``initialize``; the rest as for ``build.make``."""
        self.engine = initialize(base, ordered.values(), settings, config)
        optimizer = self.engine.optimizer
        (values,), (self._part,) = optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups
        make_moments(self.engine, [self._part])
        optimizer._lazy_init_hp_params_optimizer_state()
        flat = FlatGradients(ordered, values, scalars)
        begin = values.storage_offset() - flat.gradient.storage_offset()
        for name, gradient in flat.gradients.items():
            assert ordered[name].storage_offset() == begin + gradient.storage_offset()
        super().__init__(base, parameters, flat, forward, settings, group)

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.formed is not None:
            super().backward(loss, last)
        else:
            # Not loss.backward(): autograd's accumulation would call the hooks with which DeepSpeed waits for
            # gradients.
            self.add_gradients(loss)

    def step(self, learning_rate: float) -> None:
        size = self._part.numel()
        mine = self.flat.gradient.narrow(0, size * self.group.dist_rank, size)
        # Also with NVMe: these stages keep on the CPU what would go there.
        if self.engine.optimizer.cpu_offload:
            self._part.grad.copy_(mine)
        else:
            self.engine.optimizer.averaged_gradients[0] = [mine]
        step(self.engine, learning_rate)

    def moments(self) -> dict[str, Tensors]:
        return moments(self.parameters)

    @torch.no_grad()
    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(adapters[name])
            safe_set_full_fp32_param(parameter, adapters[name].to(self.group.device))
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, moments[moment][name].to(self.group.device), moment)
        set_steps(self.engine, step)


class DividedModel:
    """An ``Engine`` of stage 3: base, adapters, gradients and optimiser are divided over the ranks.

    Within the passes DeepSpeed gathers layers, or blocks whose weights are formed, and averages gradients.
    """

    collectives_in_forward = divided = True
    steps_ahead = False
    gradient = None

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
        """config: see ``initialize``; the rest as for ``build.make``."""
        self.parameters, self._forward = parameters, forward
        self.group = group
        self.scalars = torch.zeros(scalars, device=group.device)
        self.formed, blocks = form_by_block(base, list(layers), settings, group)
        for layer in layers:
            for parameter in layer.trained().values() if layer.formed is None else ():
                # A child's tensor that the layer itself reads: it must be gathered together with the layer's own.
                deepspeed.zero.register_external_parameter(layer, parameter)
        gathered = [block.gathered for block in blocks]
        self.engine = initialize(base, parameters.values(), settings, config, gathered)
        for block in blocks:
            block.remove_hooks()
        make_moments(self.engine, self._parts)

    @property
    def _parts(self) -> list[Tensor]:
        """This rank's parts of the adapters, flat, as AdamW steps them."""
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def zero(self) -> None:
        self.scalars.zero_()

    def losses(self, batch: MicroBatch) -> Losses:
        return self.evaluate(partial(self._forward, batch))

    def evaluate(self, work: Callable[[], Result]) -> Result:
        return self.engine(work)

    def whole(self, layer: nn.Module) -> contextlib.AbstractContextManager:
        return deepspeed.zero.GatheredParameters(list(layer.parameters()))

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # The loss comes divided by the accumulation.
        self.engine.backward(loss, scale_wrt_gas=False)

    def _gradients(self) -> list[Tensor]:
        """This rank's parts of the mean gradient; on the CPU if the optimiser's state is."""
        if self.engine.zero_cpu_offload():
            return [part.grad for part in self._parts]
        return [gradient for parts in self.engine.optimizer.averaged_gradients.values() for gradient in parts]

    def average(self) -> Tensor:
        """Only compute the norm and reduce it with the scalars: DeepSpeed has averaged in the backward pass."""
        gradients = self._gradients()
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
        summed = self.group.sum_(torch.cat([self.scalars, norms.square().sum()[None].to(self.scalars.device)]))
        self.scalars.copy_(summed[:-1])
        return summed[-1].sqrt()

    def step(self, learning_rate: float) -> None:
        step(self.engine, learning_rate)

    def adapters(self) -> Tensors:
        return {name: safe_get_full_fp32_param(value).cpu().clone() for name, value in self.parameters.items()}

    def moments(self) -> dict[str, Tensors]:
        return moments(self.parameters)

    @torch.no_grad()
    def restore(self, adapters: Tensors, moments: dict[str, Tensors], step: int) -> None:
        whole = list(self.parameters.values())
        # Values written in this context by rank 0 are kept, on all ranks.
        with deepspeed.zero.GatheredParameters(whole, modifier_rank=0):
            for name, parameter in self.parameters.items():
                parameter.copy_(adapters[name])
        for name, parameter in self.parameters.items():
            safe_set_local_fp32_param(parameter, self._part_of(parameter, adapters[name]))
            for moment in MOMENTS:
                safe_set_local_optimizer_state(parameter, self._part_of(parameter, moments[moment][name]), moment)
        set_steps(self.engine, step)

    def _part_of(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a tensor. DeepSpeed's own function fails where the last part is padded."""
        size = parameter.ds_tensor.numel()
        padded = functional.pad(value.flatten(), (0, size * self.group.world_size - value.numel()))
        return padded.narrow(0, size * self.group.dist_rank, size).to(self.group.device)
