"""Form every adapted layer's W': once per optimiser step, or block by block at each use. Which runs do which."""

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

    Kept, all of them are formed once per optimiser step. Per use, those of a block are formed right before every
    forward pass of the block, also the one that its backward pass repeats: all blocks share the memory of the largest,
    and every block is recomputed. Layers outside of the blocks are formed once per step either way.

    per_use   which of the two
    parts     by block, what is formed together; None: once per step
    """

    def __init__(
        self, base: Base, layers: Sequence[AdaptedLayer], specs: Sequence[FormedSpec], products: torch.dtype
    ) -> None:
        """specs: one per layer, in their order; products: the format of the products. ``allocate`` comes next."""
        self._transformer, self._layers, self._specs, self._products = base.dit.transformer, layers, specs, products
        self._blocks = block_numbers(base, layers)
        self.per_use = False
        self.parts: dict[int | None, FormedWeights] = {}

    def allocate(self, per_use: bool) -> None:
        """Make room for W', and let go of what was there. Not where a CUDA graph has been recorded with that."""
        self.release()
        members: dict[int | None, list[int]] = {}
        for index, block in enumerate(self._blocks):
            members.setdefault(block if per_use else None, []).append(index)
        specs = {block: [self._specs[index] for index in indices] for block, indices in members.items()}
        largest = max((product_elements(of_block) for block, of_block in specs.items() if block is not None), default=0)
        shared = torch.empty(largest, dtype=self._products, device=self._specs[0].weight_OI.device)
        for block, of_block in specs.items():
            memory = None if block is None else shared
            self.parts[block] = FormedWeights(of_block, self._products, memory=memory)
            for index, made in zip(members[block], self.parts[block].layers, strict=True):
                self._layers[index].formed = made
        self.per_use = per_use
        self._transformer.form_block = self._form_block if per_use else None

    def release(self) -> None:
        """Let go of all memory; the layers then multiply in factored form."""
        self._transformer.form_block = None
        self.parts.clear()
        for layer in self._layers:
            layer.formed = None

    def form(self) -> None:
        """Form from the trained tensors as they are now, per use but for the blocks' layers."""
        if None in self.parts:
            self.parts[None].form()

    def _form_block(self, number: int) -> None:
        if number in self.parts:
            self.parts[number].form()

    def finish(self) -> None:
        """Raw sums to gradients, in place. The trained tensors must be those of the last passes."""
        for part in self.parts.values():
            part.finish()


def block_numbers(base: Base, layers: Sequence[AdaptedLayer]) -> list[int | None]:
    """The number of the block that each layer is part of; None: it lies outside of the blocks."""
    blocks = enumerate(base.dit.transformer.layers)
    block_of = {id(module): number for number, block in blocks for module in block.modules()}
    return [block_of.get(id(layer)) for layer in layers]


def product_format(base: Base, settings: Settings) -> torch.dtype:
    return torch.bfloat16 if settings.mixed_precision == "bf16" else base.dtype


def keep_formed(base: Base, flat: FlatGradients, settings: Settings, device: torch.device) -> Formed | None:
    """Have the adapted layers of ``base`` multiply with W' as ``form`` of what is returned, and passes, leave it.

    None: not wanted, or with ``adapter_products: auto`` not possible, or not right in a trial; the log says why.

    flat       the adapters' values and gradients
    settings   adapter_products, mixed_precision, gradient_checkpointing
    """
    products = product_format(base, settings)
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
    # Where blocks have parts of their own their kernels are alike.
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
    """gradients: by trained tensor, where its raw sums are found and its gradient is left."""
    trained = layer.trained()
    return FormedSpec(
        weight_OI=layer.weight.detach().flatten(1),
        params={name: parameter.detach() for name, parameter in trained.items()},
        grads={name: gradients[parameter] for name, parameter in trained.items()},
        kind=layer.kind,
        scale=layer.strength * layer.scale,
        frozen=layer.adapter.frozen if layer.kind.xs else None,
    )
