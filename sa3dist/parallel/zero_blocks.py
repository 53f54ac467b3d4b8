"""Blocks of a base divided over the ranks, with adapted weights formed in each of their passes.

    forward     gather the block, form W', run the block; keep only its inputs
    backward    gather, form and run it again; its backward pass leaves raw sums; FINISH turns them into gradients

FINISH is linear in the sums, so it may run for every block and micro batch. Its gradients reach the trained tensors
through autograd, in a graph where these were whole: DeepSpeed sees an ordinary gradient of each tensor.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from sa3dist_kernels import share_statistics
from sa3dist_kernels.dispatch import obstacle_to, trial
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sa3dist.adapters.formed import Formed, block_indices, product_dtype, spec_of
from sa3dist.parallel.engine import Result

if TYPE_CHECKING:
    from sa3dist_kernels import FormedWeights

    from sa3dist.adapters.layers import AdaptedLayer
    from sa3dist.model.base import Base
    from sa3dist.runtime.process_group import Group
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)


class Gathered(nn.Module):
    """Holds tensors of other modules: DeepSpeed gathers them before every call and divides them again after it."""

    def __init__(self, tensors: Iterable[nn.Parameter]) -> None:
        super().__init__()
        for tensor in tensors:
            deepspeed.zero.register_external_parameter(self, tensor)

    def forward(self, work: Callable[..., Result], *given: Tensor) -> Result:
        return work(*given)


class DividedBlock:
    """One block that has adapted layers, and how it is run.

    gathered   a module that DeepSpeed has to see
    """

    def __init__(self, block: nn.Module, layers: Sequence[AdaptedLayer], part: FormedWeights, found: Tensor) -> None:
        """found: flat gradients of the trained tensors of ``layers``, in their order, as ``part`` writes them."""
        self._block, self._part, self._found = block, part, found
        self._trained = _trained(layers)
        # Without the block's own tensor: the transformer reads those of all blocks at once.
        self.gathered = Gathered(tensor for child in block.children() for tensor in child.parameters())
        # DeepSpeed frees a module's tensors once the gradient of the module's input exists: give it an input with a
        # gradient.
        self._entering = found.new_zeros(1).requires_grad_()
        sizes = [sum(tensor.numel() for tensor in layer.trained().values()) for layer in layers]
        self._leaves = [span.requires_grad_() for span in found.split(sizes)]
        # The tensors that the part reads, and the parameters they come from: gathered values have a new address each
        # time.
        self._read: list[tuple[Tensor, nn.Parameter]] = []
        for layer, leaf, spec in zip(layers, self._leaves, part.specs, strict=True):
            layer.sums = leaf
            self._read.append((spec.weight_OI, layer.weight))
            self._read += [(spec.params[name], tensor) for name, tensor in layer.trained().items()]
        # Made once: making one per tensor and pass cost the host 1.5 ms per step.
        self._nothing = {read.dtype: read.new_empty(0) for read, _ in self._read}
        self._forget()

    def remove_hooks(self) -> None:
        """Remove DeepSpeed's hooks from the block's modules, whose tensors are gathered with the block."""
        for module in self._block.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()

    def run(self, function: Callable[..., Tensor], *given: Any) -> Tensor:
        """``function(*given)``, which forms the block's weights and runs it; gradients reach tensors in ``given``."""
        if not torch.is_grad_enabled():
            return self.gathered(lambda: self.once(function, *given))
        values, structure = tree_flatten(given)

        def run(entering: Tensor) -> Tensor:
            # Joins the gradients of all trained tensors into one. Its values are never read.
            joined = torch.cat([*(tensor.flatten() for tensor in self._trained), entering])
            return _Pass.apply(self, function, structure, joined, *values)

        return self.gathered(run, self._entering)

    def once(self, function: Callable[..., Tensor], *given: Any) -> Tensor:
        """``function(*given)`` while the block's tensors are gathered."""
        with self._values():
            return function(*given)

    def gradients(self, run: Callable[[], Tensor], entered: list[Tensor], grad: Tensor) -> Iterator[Tensor | None]:
        """Gradients of ``joined`` and of ``entered``, given ``grad`` of what ``run`` computes from them."""
        with self._values():
            with torch.enable_grad():
                output = run()
            found = torch.autograd.grad(output, [*self._leaves, *entered], grad, allow_unused=True)
            # None: this pass did not use the layer.
            sums = [torch.zeros_like(leaf) if of is None else of for leaf, of in zip(self._leaves, found, strict=False)]
            torch.cat(sums, out=self._found)
            self._part.finish()
        # A copy: the next block writes to the same memory.
        yield torch.cat([self._found, torch.zeros_like(self._entering)])
        yield from found[len(self._leaves) :]

    @contextlib.contextmanager
    def _values(self) -> Iterator[None]:
        """Inside this context the part reads the gathered tensors."""
        for read, tensor in self._read:
            read.data = tensor.data.flatten(1) if tensor.dim() == 3 else tensor.data
        try:
            yield
        finally:
            self._forget()

    def _forget(self) -> None:
        for read, _ in self._read:
            read.data = self._nothing[read.dtype]


class _Pass(torch.autograd.Function):
    """A pass of a block that keeps its inputs, and is repeated in the backward pass."""

    @staticmethod
    def forward(ctx, block: DividedBlock, function: Callable[..., Tensor], structure: TreeSpec, _, *values):
        ctx.block, ctx.function, ctx.structure = block, function, structure
        ctx.places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in values]
        ctx.save_for_backward(*(values[place] for place in ctx.places))
        device = values[ctx.places[0]].device.type
        # The backward pass runs outside of the forward pass's autocast: save its state.
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        return block.once(function, *tree_unflatten(values, structure))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, needed = list(ctx.others), ctx.needs_input_grad[4:]
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            # Pass on the very same tensor if it needs no gradient: it carries what the compiler was told about its
            # lengths.
            values[place] = tensor.detach().requires_grad_() if needed[place] else tensor

        def run() -> Tensor:
            with torch.autocast(**ctx.autocast):
                return ctx.function(*tree_unflatten(values, ctx.structure))

        found = ctx.block.gradients(run, list(itertools.compress(values, needed)), grad)
        return None, None, None, next(found), *(next(found) if need else None for need in needed)


def form_by_block(
    base: Base, layers: Sequence[AdaptedLayer], settings: Settings, group: Group
) -> tuple[Formed | None, list[DividedBlock]]:
    """Let blocks of ``base`` multiply with W' from now on. Returns these weights and the blocks. Called on all ranks.

    No blocks if the settings do not ask for it or, with ``adapter_products: auto``, if any rank cannot; the log says
    why. Layers outside of the blocks stay in factored form. Call it while every rank has the whole base, and show
    ``gathered`` of each block to DeepSpeed.

    settings   adapter_products, mixed_precision, gradient_checkpointing
    """
    products, choice = product_dtype(base, settings), settings.adapter_products
    if choice == "factored":
        return None, []
    members: dict[int, list[AdaptedLayer]] = {}
    for layer, number in zip(layers, block_indices(base, layers), strict=True):
        if number is not None:
            members.setdefault(number, []).append(layer)
    obstacle = None if members else "none is part of a block"
    if choice == "auto" and obstacle is None:
        off = settings.gradient_checkpointing == "off"
        obstacle = "gradient_checkpointing is off" if off else obstacle_to(group.device, products)
    if found := _on_any(group, obstacle):
        log.info("adapted layers on %s in %s: factored (%s)", group.device, products, found)
        return None, []
    formed, gradients = _allocate(base, members, products)
    # One part is enough: all have the same kernels.
    failure = trial(next(iter(formed.parts.values()))) if choice == "auto" else None
    if found := _on_any(group, failure):
        formed.release()
        log.warning("adapted layers on %s in %s: factored, the kernels failed: %s", group.device, products, found)
        return None, []
    blocks = []
    for number, of_block in members.items():
        span = gradients[: sum(tensor.numel() for tensor in _trained(of_block))]
        block = DividedBlock(base.dit.transformer.layers[number], of_block, formed.parts[number], span)
        base.dit.transformer.block_runners[number] = block.run
        blocks.append(block)
    log.info("adapted weights are formed for every use of a block, in %s; outside of blocks: factored", products)
    return formed, blocks


def _on_any(group: Group, reason: str | None) -> str | None:
    """The reason of the first rank that has one: ranks that gather tensors together must take the same path."""
    return next(filter(None, group.gather(reason)), None)


def _allocate(base: Base, members: dict[int, list[AdaptedLayer]], products: torch.dtype) -> tuple[Formed, Tensor]:
    """Weights formed per use, and the flat memory for raw sums and gradients.

    All blocks share both, because a block is finished within the pass that formed it.
    """
    of_blocks = [_trained(of_block) for of_block in members.values()]
    longest = max(sum(tensor.numel() for tensor in tensors) for tensors in of_blocks)
    found = of_blocks[0][0].new_zeros(longest).detach()
    grads = {}
    for tensors in of_blocks:
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, span in zip(tensors, found[: sum(sizes)].split(sizes), strict=True):
            grads[tensor] = span.view(tensor.shape)
    layers = list(itertools.chain.from_iterable(members.values()))
    formed = Formed(base, layers, [spec_of(layer, grads) for layer in layers], products)
    formed.allocate(per_use=True)
    share_statistics(list(formed.parts.values()))
    return formed, found


def _trained(layers: Iterable[AdaptedLayer]) -> list[nn.Parameter]:
    return [tensor for layer in layers for tensor in layer.trained().values()]
