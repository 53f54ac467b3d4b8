"""Counts on fake tensors: operations and bytes of every product, and what is saved for the backward pass."""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from sa3dist.model.base import Base


def _varlen_sizes(q_KPHD: Tensor, k_JPHD: Tensor, starts: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes (clips, heads of all members, tokens, width) of queries and keys, for clips of one length."""
    clips = starts.numel() - 1
    return tuple((clips, x.shape[1] * x.shape[2], x.shape[0] // clips, x.shape[3]) for x in (q_KPHD, k_JPHD))


def _varlen_flops(q_KPHD, k_JPHD, v_JHD, q_starts, k_starts, **_) -> int:
    queries, keys = _varlen_sizes(q_KPHD, k_JPHD, q_starts)
    return sdpa_flop_count(queries, keys, keys)


def _varlen_backward_flops(grad_KHD, q_KPHD, k_JPHD, v_JHD, out_KPHD, lse, q_starts, k_starts, **_) -> int:
    queries, keys = _varlen_sizes(q_KPHD, k_JPHD, q_starts)
    return sdpa_backward_flop_count(queries, queries, keys, keys)


def _self_attention_gradient_flops(grad_KHD, qkv_KSHD, out_KPHD, *others, **_) -> int:
    *_, starts, _, _ = others
    sizes, _ = _varlen_sizes(out_KPHD, out_KPHD, starts)
    return sdpa_backward_flop_count(sizes, sizes, sizes, sizes)


_ops = torch.ops
# torch's registry, plus what it lacks: attention on a CPU, our own attention, oneDNN's product, in-place addmm.
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
    """(floating-point operations, bytes of operands and results) of every product and attention.

    A multiply-add counts as two operations.
    """

    operations: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.operations)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> tuple[float, float]:
        """Minimum time on a device, split into compute-bound and memory-bound operations."""
        computing = moving = 0.0
        for flops, moved in self.operations:
            compute, memory = flops / flops_per_second, moved / bytes_per_second
            computing += compute if compute >= memory else 0
            moving += memory if memory > compute else 0
        return computing, moving


@dataclasses.dataclass
class Part:
    """A part of the network: its forward and backward work, and the bytes it produces that are saved for backward."""

    forward: Work = dataclasses.field(default_factory=Work)
    backward: Work = dataclasses.field(default_factory=Work)
    saved_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Count:
    """One micro batch without recomputation: the blocks in order, and everything else (``ends``).

    input_bytes   of a block's input, which is saved if the block is recomputed
    """

    ends: Part
    blocks: tuple[Part, ...]
    input_bytes: int

    def total(self, recomputed_blocks: int = 0) -> Work:
        """Forward, backward, and the forward of the first ``recomputed_blocks`` blocks again."""
        total = Work()
        for i, part in enumerate((self.ends, *self.blocks)):
            total.operations += part.forward.operations * (2 if 0 < i <= recomputed_blocks else 1)
            total.operations += part.backward.operations
        return total

    def saved_bytes(self, recomputed_blocks: int = 0) -> int:
        """Bytes saved at the start of the backward pass, plus those of one block while it is recomputed."""
        first, rest = self.blocks[:recomputed_blocks], self.blocks[recomputed_blocks:]
        saved = self.ends.saved_bytes + sum(part.saved_bytes for part in rest) + len(first) * self.input_bytes
        return saved + max((part.saved_bytes for part in first), default=0)


class Counter(TorchDispatchMode):
    """Records every product and saved tensor under the block that produces it; None is outside of blocks."""

    def __init__(self, base: Base, compiled: bool) -> None:
        super().__init__()
        self.compiled = compiled
        self.parts: dict[int | None, Part] = {block: Part() for block in (None, *range(base.config.dit.depth))}
        self.input_bytes = 0
        self.in_backward = False
        self._block: int | None = None
        # The block that produced each storage.
        self._producer: dict[int, int | None] = {}
        self._saved: dict[int, torch.UntypedStorage] = {}
        # What a compiled block saves: results of products and attention (of a differential pair the difference), and
        # the inputs of norms. It recomputes the rest.
        self._compiled_saved: dict[int, torch.UntypedStorage] = {}
        transformer = base.dit.transformer
        # The first module that each block calls, and the first one after all blocks.
        first = [*(layer.pre_norm for layer in transformer.layers), transformer.project_out]
        self._handles = [
            module.register_forward_pre_hook(functools.partial(self._enter, block, before))
            for module, block, before in zip(first, [*list(self.parts)[1:], None], self.parts, strict=True)
        ]
        self._handles += [
            norm.register_forward_pre_hook(lambda _, inputs: self._note_compiled_saved(inputs))
            for layer in transformer.layers
            for norm in (layer.cross_attend_norm, layer.ff_norm)
        ]
        # The backward pass reaches the modulation after all blocks, before the first block's input.
        modulation = transformer.global_cond_embedder
        self._handles.append(modulation.register_forward_hook(lambda _, __, output: self._on_gradient(None, output)))

    def __exit__(self, *problem):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*problem)

    def _enter(self, block: int | None, before: int | None, _, inputs: tuple[Tensor]) -> None:
        storage = inputs[0].untyped_storage()
        self._producer[storage._cdata] = before
        self._note_compiled_saved(inputs)
        self._block = block
        if block is not None:
            self.input_bytes = storage.nbytes()
        self._on_gradient(before, inputs[0])

    def _note_compiled_saved(self, values) -> None:
        if self.compiled and not self.in_backward:
            self._compiled_saved |= {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(values)}

    def _on_gradient(self, block: int | None, tensor: Tensor) -> None:
        """Set the current block to ``block`` once the gradient of ``tensor`` is complete."""
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
        self._producer.update(dict.fromkeys(written.keys() - read.keys(), self._block))
        if formula is not None or function is torch.ops.aten.sub.Tensor:
            self._note_compiled_saved(out)
        if formula is not None:
            part = self.parts[self._block]
            flops = formula(*args, **(kwargs or {}), out_val=out)
            moved = sum(read.values()) + sum(written.values())
            (part.backward if self.in_backward else part.forward).operations.append((flops, moved))
        return out

    def on_save(self, tensor: Tensor) -> Tensor:
        """Hook for autograd's saved tensors."""
        storage = tensor.untyped_storage()
        # Keep a reference, so that no other storage gets the same address.
        self._saved[storage._cdata] = storage
        return tensor

    def assign_saved_bytes(self) -> None:
        """Add saved bytes to the parts that produced them; weights belong to none."""
        producer = self._producer
        saved = {key: (producer[key], storage) for key, storage in self._saved.items() if key in producer}
        if self.compiled:
            # Blocks that save nothing precede the first adapted layer.
            differentiated = {block for block, _ in saved.values()} - {None}
            in_blocks = {key: (producer[key], storage) for key, storage in self._compiled_saved.items()}
            in_blocks = {key: entry for key, entry in in_blocks.items() if entry[0] in differentiated}
            saved = {key: entry for key, entry in saved.items() if entry[0] is None} | in_blocks
        for block, storage in saved.values():
            self.parts[block].saved_bytes += storage.nbytes()
