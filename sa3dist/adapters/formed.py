"""Form every adapted layer's W' once per optimiser step: which runs do, and what the layers then multiply with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from sa3dist_kernels import FormedSpec, FormedWeights
from sa3dist_kernels.dispatch import obstacle_to, trial

from sa3dist.adapters.attach import adapted_layers

if TYPE_CHECKING:
    from sa3dist.model.base import Base
    from sa3dist.parallel.flat_adamw import FlatAdapters
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)


def keep_formed(base: Base, flat: FlatAdapters, settings: Settings, device: torch.device) -> FormedWeights | None:
    """Have the adapted layers of ``base`` multiply with W' as ``form`` of what is returned leaves it.

    None: not wanted, or with ``adapter_products: auto`` not possible, or not right in a trial; the log says why.

    flat       the adapters' values and gradients
    settings   adapter_products, mixed_precision
    """
    products = torch.bfloat16 if settings.mixed_precision == "bf16" else base.dtype
    choice = settings.adapter_products
    if choice == "factored":
        return None
    if choice == "auto" and (obstacle := obstacle_to(device, products)):
        log.info("adapted layers on %s in %s: factored (%s)", device, products, obstacle)
        return None
    owners = {id(value): layer for layer in adapted_layers(base).values() for value in layer.trained().values()}
    layers = list(dict.fromkeys(owners[id(parameter)] for parameter in flat.parameters.values()))
    leaves = flat.join([list(layer.trained().values()) for layer in layers])
    specs = []
    for layer in layers:
        trained, frozen = layer.trained(), layer.adapter.frozen
        bases = [base.contiguous() for base in (frozen.left_OR, frozen.right_IR)] if layer.kind.xs else (None, None)
        specs.append(
            FormedSpec(
                weight_OI=layer.weight.detach().flatten(1),
                params={name: parameter.detach() for name, parameter in trained.items()},
                grads={name: parameter.grad for name, parameter in trained.items()},
                kind=layer.kind,
                scale=layer.strength * layer.scale,
                left_OR=bases[0],
                right_IR=bases[1],
            )
        )
    formed = FormedWeights(specs, products)
    if choice == "auto" and (failure := trial(formed)):
        log.warning("adapted layers on %s in %s: factored, because the kernels failed: %s", device, products, failure)
        return None
    for layer, made, leaf in zip(layers, formed.layers, leaves, strict=True):
        layer.formed, layer.sums = made, leaf
    log.info("adapted weights are formed once per step, in %s", products)
    return formed
