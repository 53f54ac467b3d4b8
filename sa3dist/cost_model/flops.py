"""Counting on fake tensors: operations and bytes of every product, and tensors saved for the backward pass."""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from sa3dist.model.base import Base


def _varlen_sizes(q_KPHD: Tensor, k_JPHD: Tensor, starts: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Queries and keys of clips of one length, as shapes (clips, heads of both members of a pair, tokens, width)."""
    clips = starts.numel() - 1
    return tuple((clips, x.shape[1] * x.shape[2], x.shape[0] // clips, x.shape[3]) for x in (q_KPHD, k_JPHD))


def _varlen_flops(q_KPHD, k_JPHD, v_JHD, q_starts, k_starts, **_) -> int:
    queries, keys = _varlen_sizes(q_KPHD, k_JPHD, q_starts)
    return sdpa_flop_count(queries, keys, keys)


def _varlen_backward_flops(grad_KHD, q_KPHD, k_JPHD, v_JHD, out_KPHD, sums, q_starts, k_starts, **_) -> int:
    queries, keys = _varlen_sizes(q_KPHD, k_JPHD, q_starts)
    return sdpa_backward_flop_count(queries, queries, keys, keys)


def _self_attention_gradient_flops(grad_KHD, qkv_KSHD, out_KPHD, *others, **_) -> int:
    *_, starts, _, _ = others
    sizes, _ = _varlen_sizes(out_KPHD, out_KPHD, starts)
    return sdpa_backward_flop_count(sizes, sizes, sizes, sizes)


_ops = torch.ops
# Missing in torch's own registry: attention on a CPU and ours, oneDNN's product, and the in-place addition.
FLOPS = {
    **flop_registry,
    _ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: mm_flop(x.shape, weight.shape[::-1]),
    _ops.aten.addmm_: lambda _, a, b, *__, **___: mm_flop(a.shape, b.shape),
    _ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
    _ops.sa3dist.varlen_attention: _varlen_flops,
    _ops.sa3dist.varlen_attention_backward: _varlen_backward_flops,
    _ops.sa3dist.self_attention_gradient: _self_attention_gradient_flops,
}


@dataclasses.dataclass
class Work:
    """Floating point operations, and bytes of operands and results, of all products and attention.

    A multiply-add counts twice.
    """

    operations: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.operations)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> tuple[float, float]:
        """Shortest time on such a device, split: for operations limited by arithmetic, and by memory."""
        computing = moving = 0.0
        for flops, moved in self.operations:
            compute, memory = flops / flops_per_second, moved / bytes_per_second
            computing += compute if compute >= memory else 0
            moving += memory if memory > compute else 0
        return computing, moving


@dataclasses.dataclass
class Part:
    """One piece of the network: its forward and backward work, and bytes it makes that the backward pass needs."""

    forward: Work = dataclasses.field(default_factory=Work)
    backward: Work = dataclasses.field(default_factory=Work)
    kept_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Count:
    """One micro batch without recomputation: the blocks in order, and everything around them.

    input_bytes   of a block's input, which is kept when the block is recomputed
    """

    ends: Part
    blocks: tuple[Part, ...]
    input_bytes: int

    def total(self, recomputed_blocks: int = 0) -> Work:
        """Forward, backward, and a second forward of the first ``recomputed_blocks`` blocks."""
        total = Work()
        for i, part in enumerate((self.ends, *self.blocks)):
            total.operations += part.forward.operations * (2 if 0 < i <= recomputed_blocks else 1)
            total.operations += part.backward.operations
        return total

    def kept_bytes(self, recomputed_blocks: int = 0) -> int:
        """Bytes kept when the backward pass starts, plus the working set of one recomputed block."""
        first, rest = self.blocks[:recomputed_blocks], self.blocks[recomputed_blocks:]
        kept = self.ends.kept_bytes + sum(part.kept_bytes for part in rest) + len(first) * self.input_bytes
        return kept + max((part.kept_bytes for part in first), default=0)


class Counter(TorchDispatchMode):
    """Notes every product, and every saved tensor, under the block that makes it; None = outside of blocks."""

    def __init__(self, base: Base, compiled: bool) -> None:
        super().__init__()
        self.compiled = compiled
        self.parts: dict[int | None, Part] = {block: Part() for block in (None, *range(base.config.dit.depth))}
        self.input_bytes = 0
        self.backwards = False
        self._block: int | None = None
        # By storage: the block that made it.
        self._made: dict[int, int | None] = {}
        self._kept: dict[int, torch.UntypedStorage] = {}
        # Kept by a compiled block: results of products and attention (of a pair, their difference), and the residual
        # stream where it enters a norm. The rest is recomputed.
        self._lasting: dict[int, torch.UntypedStorage] = {}
        transformer = base.dit.transformer
        # The first module called by each block, and the first one behind all blocks.
        first = [*(layer.pre_norm for layer in transformer.layers), transformer.project_out]
        self._handles = [
            module.register_forward_pre_hook(functools.partial(self._enter, block, before))
            for module, block, before in zip(first, [*list(self.parts)[1:], None], self.parts, strict=True)
        ]
        self._handles += [
            norm.register_forward_pre_hook(lambda _, inputs: self._last(inputs))
            for layer in transformer.layers
            for norm in (layer.cross_attend_norm, layer.ff_norm)
        ]
        # The blocks' modulation is differentiated after the blocks, before the first one's input.
        modulation = transformer.global_cond_embedder
        self._handles.append(modulation.register_forward_hook(lambda _, __, output: self._leave_for(None, output)))

    def __exit__(self, *problem):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*problem)

    def _enter(self, block: int | None, before: int | None, _, inputs: tuple[Tensor]) -> None:
        storage = inputs[0].untyped_storage()
        self._made[storage._cdata] = before
        self._last(inputs)
        self._block = block
        if block is not None:
            self.input_bytes = storage.nbytes()
        self._leave_for(before, inputs[0])

    def _last(self, values) -> None:
        if self.compiled and not self.backwards:
            self._lasting |= {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(values)}

    def _leave_for(self, block: int | None, tensor: Tensor) -> None:
        """When the gradient of ``tensor`` is complete, the backward pass enters ``block``."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: setattr(self, "_block", block))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.is_view:
            return out
        read, written = (
            {x.untyped_storage()._cdata: x.numel() * x.itemsize for x in tree_leaves(values) if isinstance(x, Tensor)}
            for values in ((args, kwargs), out)
        )
        formula = FLOPS.get(function._overloadpacket)
        self._made.update(dict.fromkeys(written.keys() - read.keys(), self._block))
        if formula is not None or function is torch.ops.aten.sub.Tensor:
            self._last(out)
        if formula is not None:
            part = self.parts[self._block]
            flops = formula(*args, **(kwargs or {}), out_val=out)
            moved = sum(read.values()) + sum(written.values())
            (part.backward if self.backwards else part.forward).operations.append((flops, moved))
        return out

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Hold it, so that no other storage gets the same address.
        self._kept[storage._cdata] = storage
        return tensor

    def settle_kept(self) -> None:
        """Add saved tensors to the parts that made them; weights were made by none."""
        made = {key: (self._made[key], storage) for key, storage in self._kept.items() if key in self._made}
        if self.compiled:
            # A block that saves nothing comes before the first adapted layer.
            differentiated = {block for block, _ in made.values()} - {None}
            lasting = {key: (self._made[key], storage) for key, storage in self._lasting.items()}
            lasting = {key: found for key, found in lasting.items() if found[0] in differentiated}
            made = {key: found for key, found in made.items() if found[0] is None} | lasting
        for block, storage in made.values():
            self.parts[block].kept_bytes += storage.nbytes()
