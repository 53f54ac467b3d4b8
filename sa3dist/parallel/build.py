"""Make the engine of the parallel mode that this process was launched in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from sa3dist.parallel.ddp import FlatEngine
from sa3dist.parallel.engine import Engine, Losses
from sa3dist.runtime.process_group import Group

if TYPE_CHECKING:
    from sa3dist.adapters.layers import AdaptedLayer


def make(
    base,
    layers: Collection[AdaptedLayer],
    parameters: dict[str, nn.Parameter],
    forward: Callable[..., Losses],
    settings,
    work,
    group: Group,
    scalars: int,
) -> Engine:
    """The engine of the mode this process was launched in.

    layers    the adapted layers of ``base``, whose parameters ``parameters`` names
    forward   (batch) to its losses        scalars   how many float32 values travel with the gradients
    settings  learning_rate, weight_decay, gradient_compression, adapter_products, mixed_precision
    work      micro_batch, accumulation, adapt_memory
    """
    share_initial_state(parameters, layers, group)
    if group.deepspeed is None:
        return FlatEngine(base, parameters, forward, settings, group, scalars)
    # DeepSpeed is imported where it is used: most runs do without it.
    from sa3dist.parallel import zero_config
    from sa3dist.parallel.zero import ZeroEngine

    compression = settings.gradient_compression
    config = zero_config.build(group.deepspeed, work.micro_batch, work.accumulation, group.world_size, compression)
    return ZeroEngine(base, layers, parameters, forward, settings, config, group, scalars, separate=work.adapt_memory)


@torch.no_grad()
def share_initial_state(parameters: dict[str, nn.Parameter], layers: Iterable[AdaptedLayer], group: Group) -> None:
    """Give every rank rank 0's adapters, and the frozen constants they act with.

    Both come out of norms and singular vectors, whose last bits, and signs, differ between kinds of CPU.
    """
    for parameter in parameters.values():
        group.broadcast_(parameter.data)
    for layer in layers:
        for constant in layer.adapter.buffers():
            group.broadcast_(constant)
