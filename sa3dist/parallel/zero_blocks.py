"""Blocks of a base that is divided over the ranks, on adapted weights formed for each of their passes.

    forward     gather the block, form W', run the block; what enters it is all that is kept
    backward    gather, form and run it once more; its backward pass leaves raw sums; FINISH turns them into gradients

FINISH is linear in the sums, so that it may run for every block and micro batch. What it finds reaches the trained
tensors through autograd, in a graph where they were whole: DeepSpeed sees an ordinary gradient of each of them.
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

from sa3dist.adapters.formed import Formed, block_numbers, product_format, spec_of
from sa3dist.parallel.engine import Result

if TYPE_CHECKING:
    from sa3dist_kernels import FormedWeights

    from sa3dist.adapters.layers import AdaptedLayer
    from sa3dist.model.base import Base
    from sa3dist.runtime.process_group import Group
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)


class Gathered(nn.Module):
    """Tensors of other modules: DeepSpeed makes them whole ahead of every call of it, and divides them behind it."""

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
        """found: flat, where ``part`` has the gradients of the trained tensors of ``layers``, in their order."""
        self._block, self._part, self._found = block, part, found
        self._trained = _trained(layers)
        # Not the block's own tensor: the transformer reads those of all blocks at once.
        self.gathered = Gathered(tensor for child in block.children() for tensor in child.parameters())
        # DeepSpeed lets go of a module's tensors once the gradient of what entered the module is there.
        self._entering = found.new_zeros(1).requires_grad_()
        sizes = [sum(tensor.numel() for tensor in layer.trained().values()) for layer in layers]
        self._leaves = [span.requires_grad_() for span in found.split(sizes)]
        # What the part reads, and whose values these are: they lie elsewhere each time they have been gathered.
        self._read: list[tuple[Tensor, nn.Parameter]] = []
        for layer, leaf, spec in zip(layers, self._leaves, part.specs, strict=True):
            layer.sums = leaf
            self._read.append((spec.weight_OI, layer.weight))
            self._read += [(spec.params[name], tensor) for name, tensor in layer.trained().items()]
        # Made once: one for each tensor and pass took the host 1.5 ms of a step.
        self._nothing = {read.dtype: read.new_empty(0) for read, _ in self._read}
        self._forget()

    def remove_hooks(self) -> None:
        """Take away DeepSpeed's hooks of the block's modules, whose tensors are gathered with the block."""
        for module in self._block.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()

    def run(self, function: Callable[..., Tensor], *given: Any) -> Tensor:
        """``function(*given)``, which forms the block's weights and runs it; gradients reach tensors in ``given``."""
        if not torch.is_grad_enabled():
            return self.gathered(lambda: self.once(function, *given))
        values, structure = tree_flatten(given)

        def run(entering: Tensor) -> Tensor:
            # Its gradient is made of those of all trained tensors. Its values are not read.
            joined = torch.cat([*(tensor.flatten() for tensor in self._trained), entering])
            return _Pass.apply(self, function, structure, joined, *values)

        return self.gathered(run, self._entering)

    def once(self, function: Callable[..., Tensor], *given: Any) -> Tensor:
        """``function(*given)``, for which the block's tensors have been gathered."""
        with self._values():
            return function(*given)

    def gradients(self, run: Callable[[], Tensor], entered: list[Tensor], grad: Tensor) -> Iterator[Tensor | None]:
        """Gradients of ``joined`` and of ``entered``, for ``grad`` of what ``run`` makes of these."""
        with self._values():
            with torch.enable_grad():
                output = run()
            found = torch.autograd.grad(output, [*self._leaves, *entered], grad, allow_unused=True)
            # None: the pass went past that layer.
            sums = [torch.zeros_like(leaf) if of is None else of for leaf, of in zip(self._leaves, found, strict=False)]
            torch.cat(sums, out=self._found)
            self._part.finish()
        # A copy: those of the next block come to the same place.
        yield torch.cat([self._found, torch.zeros_like(self._entering)])
        yield from found[len(self._leaves) :]

    @contextlib.contextmanager
    def _values(self) -> Iterator[None]:
        """While this is entered, the part reads the tensors that have been gathered."""
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
    """A pass of a block that keeps what enters it, and is repeated in the backward pass."""

    @staticmethod
    def forward(ctx, block: DividedBlock, function: Callable[..., Tensor], structure: TreeSpec, _, *values):
        ctx.block, ctx.function, ctx.structure = block, function, structure
        ctx.places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in values]
        ctx.save_for_backward(*(values[place] for place in ctx.places))
        device = values[ctx.places[0]].device.type
        # As in the forward pass; the backward pass runs outside of what set it.
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
            # The very tensors where they need no gradient: what the compiler was told of their lengths is part of them.
            values[place] = tensor.detach().requires_grad_() if needed[place] else tensor

        def run() -> Tensor:
            with torch.autocast(**ctx.autocast):
                return ctx.function(*tree_unflatten(values, ctx.structure))

        found = ctx.block.gradients(run, list(itertools.compress(values, needed)), grad)
        return None, None, None, next(found), *(next(found) if need else None for need in needed)


def form_by_block(
    base: Base, layers: Sequence[AdaptedLayer], settings: Settings, group: Group
) -> tuple[Formed | None, list[DividedBlock]]:
    """Have blocks of ``base`` multiply with W' from here on; these weights, and the blocks. Called on all ranks.

    No blocks where that is not wanted, or with ``adapter_products: auto`` not possible on any rank; the log says why.
    Layers outside of the blocks multiply in factored form. To be called while every rank has the whole base; what is
    ``gathered`` is to be shown to DeepSpeed.

    settings   adapter_products, mixed_precision, gradient_checkpointing
    """
    products, choice = product_format(base, settings), settings.adapter_products
    if choice == "factored":
        return None, []
    members: dict[int, list[AdaptedLayer]] = {}
    for layer, number in zip(layers, block_numbers(base, layers), strict=True):
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
    # Where blocks have parts of their own their kernels are alike.
    failure = trial(next(iter(formed.parts.values()))) if choice == "auto" else None
    if found := _on_any(group, failure):
        formed.release()
        log.warning("adapted layers on %s in %s: factored, the kernels failed: %s", group.device, products, found)
        return None, []
    blocks = []
    for number, of_block in members.items():
        span = gradients[: sum(tensor.numel() for tensor in _trained(of_block))]
        block = DividedBlock(base.dit.transformer.layers[number], of_block, formed.parts[number], span)
        base.dit.transformer.own_runs[number] = block.run
        blocks.append(block)
    log.info("adapted weights are formed for every use of a block, in %s; outside of blocks: factored", products)
    return formed, blocks


def _on_any(group: Group, reason: str | None) -> str | None:
    """The first rank's reason that has one: ranks that gather tensors together have to go the same way."""
    return next(filter(None, group.gather(reason)), None)


def _allocate(base: Base, members: dict[int, list[AdaptedLayer]], products: torch.dtype) -> tuple[Formed, Tensor]:
    """Weights formed per use, and the flat memory that raw sums and gradients of all blocks share.

    A block is finished within the pass that formed it, so that blocks share everything.
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
