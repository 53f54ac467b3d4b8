"""Forms the weights of a base's adapted layers, once per optimiser step or per use of a block, and decides which."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from sa3dist_kernels import FormedSpec, FormedWeights
from sa3dist_kernels.dispatch import obstacle_to, trial
from sa3dist_kernels.formed_spec import product_elements

from sa3dist.adapters.attach import adapted_layers

if TYPE_CHECKING:
    from sa3dist.adapters.layers import AdaptedLayer
    from sa3dist.model.base import Base
    from sa3dist.parallel.flat_adamw import FlatGradients
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)


class Formed:
    """W' of the adapted layers of a base, which multiply with it.

    Once per step: all are formed once per optimiser step. Per use: those of a block are formed before each forward pass
    of the block, including the recomputed one; all blocks share the memory of the largest, and every block is
    recomputed. Layers outside of blocks are formed once per step either way.

    per_use   which of the two
    parts     what is formed together, by block; key None: once per step
    """

    def __init__(
        self, base: Base, layers: Sequence[AdaptedLayer], specs: Sequence[FormedSpec], products: torch.dtype
    ) -> None:
        """specs: one per layer, in the same order; products: dtype of the products. Call ``allocate`` next."""
        self._transformer, self._layers, self._specs, self._products = base.dit.transformer, layers, specs, products
        self._blocks = block_indices(base, layers)
        self.per_use = False
        self.parts: dict[int | None, FormedWeights] = {}

    def allocate(self, per_use: bool) -> None:
        """Allocate W', after freeing earlier memory. Not allowed once a CUDA graph was captured with that memory."""
        self.release()
        members: dict[int | None, list[int]] = {}
        for index, block in enumerate(self._blocks):
            members.setdefault(block if per_use else None, []).append(index)
        specs = {block: [self._specs[index] for index in indices] for block, indices in members.items()}
        sizes = (product_elements(block_specs) for block, block_specs in specs.items() if block is not None)
        largest = max(sizes, default=0)
        shared = torch.empty(largest, dtype=self._products, device=self._specs[0].weight_OI.device)
        for block, block_specs in specs.items():
            memory = None if block is None else shared
            self.parts[block] = FormedWeights(block_specs, self._products, memory=memory)
            for index, formed_layer in zip(members[block], self.parts[block].layers, strict=True):
                self._layers[index].formed = formed_layer
        self.per_use = per_use
        self._transformer.form_block = self._form_block if per_use else None

    def release(self) -> None:
        """Free all memory; the layers then compute in factored form."""
        self._transformer.form_block = None
        self.parts.clear()
        for layer in self._layers:
            layer.formed = None

    def form(self) -> None:
        """Form from the current trained tensors; if per use, only layers outside of blocks."""
        if None in self.parts:
            self.parts[None].form()

    def _form_block(self, index: int) -> None:
        if index in self.parts:
            self.parts[index].form()

    def finish(self) -> None:
        """Turn raw sums into gradients, in place. Trained tensors must be unchanged since the last pass."""
        for part in self.parts.values():
            part.finish()


def block_indices(base: Base, layers: Sequence[AdaptedLayer]) -> list[int | None]:
    """The index of each layer's block; None for layers outside of blocks."""
    blocks = enumerate(base.dit.transformer.layers)
    block_of = {id(module): index for index, block in blocks for module in block.modules()}
    return [block_of.get(id(layer)) for layer in layers]


def product_dtype(base: Base, settings: Settings) -> torch.dtype:
    return torch.bfloat16 if settings.mixed_precision == "bf16" else base.dtype


def use_formed_weights(base: Base, flat: FlatGradients, settings: Settings, device: torch.device) -> Formed | None:
    """Switch the adapted layers of ``base`` to formed weights, if the settings ask for it.

    Returns None, and logs why, for ``adapter_products: factored``, and for ``auto`` if the kernels cannot run or fail
    their trial.

    flat       the adapters' values and gradients
    settings   adapter_products, mixed_precision, gradient_checkpointing
    """
    products = product_dtype(base, settings)
    choice = settings.adapter_products
    if choice == "factored":
        return None
    if choice == "auto" and (obstacle := obstacle_to(device, products)):
        log.info("adapted layers on %s in %s: factored (%s)", device, products, obstacle)
        return None
    owners = {id(value): layer for layer in adapted_layers(base).values() for value in layer.trained().values()}
    layers = list(dict.fromkeys(owners[id(parameter)] for parameter in flat.parameters.values()))
    gradients = {parameter: flat.gradients[name] for name, parameter in flat.parameters.items()}
    formed = Formed(base, layers, [spec_of(layer, gradients) for layer in layers], products)
    try:
        formed.allocate(per_use=choice == "per_use")
    except torch.OutOfMemoryError:
        if choice != "auto" or settings.gradient_checkpointing == "off":
            raise
    if not formed.parts:
        formed.allocate(per_use=True)
    # One part suffices: per use, all blocks use the same kernels.
    if choice == "auto" and (failure := trial(next(iter(formed.parts.values())))):
        formed.release()
        log.warning("adapted layers on %s in %s: factored, because the kernels failed: %s", device, products, failure)
        return None
    leaves = flat.join([list(layer.trained().values()) for layer in layers])
    for layer, leaf in zip(layers, leaves, strict=True):
        layer.sums = leaf
    when = "for every use of a block" if formed.per_use else "once per step"
    log.info("adapted weights are formed %s, in %s", when, products)
    return formed


def spec_of(layer: AdaptedLayer, gradients: dict[torch.Tensor, torch.Tensor]) -> FormedSpec:
    """The layer's spec. gradients: by trained tensor, the tensor for its raw sums and gradient."""
    trained = layer.trained()
    return FormedSpec(
        weight_OI=layer.weight.detach().flatten(1),
        params={name: parameter.detach() for name, parameter in trained.items()},
        grads={name: gradients[parameter] for name, parameter in trained.items()},
        kind=layer.kind,
        scale=layer.strength * layer.scale,
        frozen=layer.adapter.frozen if layer.kind.xs else None,
    )
