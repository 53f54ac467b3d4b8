"""Make the engine of the parallel mode in which this process was launched."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from sa3dist.parallel.ddp import FlatEngine, in_backward_order
from sa3dist.parallel.flat_adamw import FlatAdapters

if TYPE_CHECKING:
    from sa3dist.adapters.layers import AdaptedLayer
    from sa3dist.model.base import Base
    from sa3dist.parallel.engine import Engine, Losses
    from sa3dist.runtime.process_group import Group
    from sa3dist.settings import Settings
    from sa3dist.training.run_plan import RunPlan


def make(
    base: Base,
    layers: Collection[AdaptedLayer],
    parameters: dict[str, nn.Parameter],
    forward: Callable[..., Losses],
    settings: Settings,
    plan: RunPlan,
    group: Group,
    scalars: int,
) -> Engine:
    """The engine of this process's parallel mode, with equal adapters and frozen constants on all ranks.

    layers      the adapted layers of ``base``        parameters   their trained tensors, by name in a file
    forward     micro batch -> its losses             scalars      number of float32 sums sent with the gradients
    settings    provides learning_rate, weight_decay, gradient_compression, adapter_products, mixed_precision,
                gradient_checkpointing
    plan        provides micro_batch and accumulation
    Raises ConfigError when the launcher's DeepSpeed file fixes other batch sizes.
    """
    share_initial_state(parameters, layers, group)
    ordered = in_backward_order(parameters)
    if group.deepspeed is None:
        flat = FlatAdapters(ordered, settings.learning_rate, settings.weight_decay, scalars)
        return FlatEngine(base, parameters, flat, forward, settings, group)
    # Imported here, because importing DeepSpeed is slow and most runs do not use it.
    from sa3dist.parallel import zero, zero_config

    compression = settings.gradient_compression
    config = zero_config.build(group.deepspeed, plan.micro_batch, plan.accumulation, group.world_size, compression)
    if config["zero_optimization"]["stage"] < 3:
        return zero.DividedOptimizer(base, parameters, ordered, forward, settings, config, group, scalars)
    return zero.DividedModel(base, layers, parameters, forward, settings, config, group, scalars)


@torch.no_grad()
def share_initial_state(parameters: dict[str, nn.Parameter], layers: Collection[AdaptedLayer], group: Group) -> None:
    """Give every rank rank 0's adapters, and the frozen constants that belong to them.

    Both come from norms and singular vectors, whose last bits, and signs, differ between kinds of CPU.
    """
    for parameter in parameters.values():
        group.broadcast_(parameter.data)
    for layer in layers:
        for constant in layer.adapter.buffers():
            group.broadcast_(constant)
