"""A linear layer whose W' has been formed: one matrix product each way, and raw sums for its trained tensors.

    z = x W'^T      dx = dy W'

The caller adds the bias: z itself is saved for the backward pass, because small gains can still be divided out of it
(spec/formed.md section 4). Trained tensors are not arguments. The layer's raw sums are returned as the gradient of
``sums``, and ``FormedWeights.finish`` turns them into gradients once per optimiser step.
"""

from __future__ import annotations

import torch

from sa3dist_kernels.adapter_types import ADAPTER_TYPES, AdapterType
from sa3dist_kernels.frozen_products import no_autocast
from sa3dist_kernels.operations import define
from sa3dist_kernels.raw_sums import LayerPass, raw_sums
from sa3dist_kernels.sums_plan import offsets


def formed_linear(
    x: torch.Tensor,
    sums: torch.Tensor,
    weight_OI: torch.Tensor,
    left_OR: torch.Tensor,
    right_RI: torch.Tensor,
    kind: AdapterType,
    impl: str = "auto",
) -> torch.Tensor:
    """``x @ W'.T`` (..., O), in the dtype of W'.

    x                             (..., I), cast to the dtype of W'
    sums                          vector as long as the layer's trained tensors together, which receives the raw sums as
                                  its gradient; its values are not read
    weight_OI, left_OR, right_RI  of a ``FormedLayer``
    impl                          of the raw sums: "triton", "torch", or "auto", which is triton on CUDA
    """
    rows = x.reshape(-1, x.shape[-1]).to(weight_OI.dtype)
    impl = ("triton" if x.is_cuda else "torch") if impl == "auto" else impl
    z = _FormedLinear.apply(rows, sums, weight_OI, left_OR, right_RI, kind.name, impl)
    return z.view(*x.shape[:-1], weight_OI.shape[0])


class _FormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sums, weight_OI, left_OR, right_RI, kind_name, impl):
        kind = ADAPTER_TYPES[kind_name]
        with no_autocast(x.device):
            z = x @ weight_OI.t()
        ctx.save_for_backward(x, z if kind.rows else None, weight_OI, left_OR, right_RI)
        ctx.kind_name, ctx.impl = kind_name, impl
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, weight_OI, left_OR, right_RI = ctx.saved_tensors
        kind = ADAPTER_TYPES[ctx.kind_name]
        needs_x, needs_sums = ctx.needs_input_grad[:2]
        dx = grad_sums = None
        with no_autocast(dy.device):
            if needs_x or kind.cols:
                dx = dy @ weight_OI
            if needs_sums:
                grad_sums = raw_sums_op(x, dx if kind.cols else None, dy, z, left_OR, right_RI, ctx.kind_name, ctx.impl)
        return dx if needs_x else None, grad_sums, None, None, None, None, None


def _raw_sums(x, dx, dy, z, left_OR, right_RI, kind_name: str, impl: str) -> torch.Tensor:
    return raw_sums([LayerPass(x, dx, dy, z, left_OR, right_RI)], ADAPTER_TYPES[kind_name], impl=impl)[0]


def _raw_sums_shape(x, dx, dy, z, left_OR, right_RI, kind_name: str, impl: str) -> torch.Tensor:
    _, total = offsets(ADAPTER_TYPES[kind_name], left_OR.shape[0], right_RI.shape[1], left_OR.shape[1])
    return x.new_empty(total, dtype=torch.promote_types(x.dtype, torch.float32))


def _joined_raw_sums(xs, dxs, dys, zs, lefts, rights, kind_name: str, impl: str) -> list[torch.Tensor]:
    none = [None] * len(xs)
    layers = [LayerPass(*operands) for operands in zip(xs, dxs or none, dys, zs or none, lefts, rights, strict=True)]
    return raw_sums(layers, ADAPTER_TYPES[kind_name], impl=impl)


def _joined_raw_sums_shape(xs, dxs, dys, zs, lefts, rights, kind_name: str, impl: str) -> list[torch.Tensor]:
    operands = zip(xs, lefts, rights, strict=True)
    return [_raw_sums_shape(x, None, None, None, left, right, kind_name, impl) for x, left, right in operands]


_SINGLE = "(Tensor x, Tensor? dx, Tensor dy, Tensor? z, Tensor left, Tensor right, str kind, str impl) -> Tensor"
define(f"raw_sums{_SINGLE}", _raw_sums, _raw_sums_shape)
# For several layers; an empty list where the type has no such tensor.
_JOINED = _SINGLE.replace("Tensor?", "Tensor").replace("Tensor", "Tensor[]")
define(f"joined_raw_sums{_JOINED}", _joined_raw_sums, _joined_raw_sums_shape)


def raw_sums_op(x, dx, dy, z, left_OR, right_RI, kind_name: str, impl: str) -> torch.Tensor:
    """``raw_sums`` of one layer; an opaque operation while compiling."""
    if torch.compiler.is_compiling():
        return torch.ops.sa3dist.raw_sums(x, dx, dy, z, left_OR, right_RI, kind_name, impl)
    return _raw_sums(x, dx, dy, z, left_OR, right_RI, kind_name, impl)
