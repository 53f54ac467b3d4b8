"""A SiLU gate, alone or in front of a formed layer, that saves only its input.

    [a, g] = z + bias      y = a silu(g)      out = y W'^T

With autograd and the compiler alone, y would be saved for the layer's raw sums. Here ``gate_gradient`` recomputes it in
the pass that reads z anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Registers the operations used below.
import sa3dist_kernels.gate_gradient  # noqa: F401
from sa3dist_kernels.adapter_types import ADAPTER_TYPES, AdapterType
from sa3dist_kernels.formed_linear import raw_sums_op
from sa3dist_kernels.frozen_products import no_autocast


def silu_gated(z: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
    """y (..., G) of z (..., 2 G), in the dtype of z. bias_F may be None."""
    return _Gate.apply(*_as_rows(z, bias_F)).view(*z.shape[:-1], z.shape[-1] // 2)


def gated_formed_linear(
    z: torch.Tensor,
    bias_F: torch.Tensor | None,
    sums: torch.Tensor,
    weight_OI: torch.Tensor,
    left_OR: torch.Tensor,
    right_RI: torch.Tensor,
    kind: AdapterType,
    impl: str = "auto",
) -> torch.Tensor:
    """``formed_linear(silu_gated(z, bias_F), ...)`` (..., O), for z in the dtype of W'; other arguments as there."""
    impl = ("triton" if z.is_cuda else "torch") if impl == "auto" else impl
    out = _GatedFormedLinear.apply(*_as_rows(z, bias_F), sums, weight_OI, left_OR, right_RI, kind.name, impl)
    return out.view(*z.shape[:-1], weight_OI.shape[0])


def _as_rows(z: torch.Tensor, bias_F: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    return z.reshape(-1, z.shape[-1]), None if bias_F is None else bias_F.to(z.dtype)


def _values(z_KF: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
    value, gate = (z_KF if bias_F is None else z_KF + bias_F).chunk(2, dim=-1)
    return value * F.silu(gate)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, bias):
        ctx.save_for_backward(z, bias)
        return _values(z, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dz = torch.ops.sa3dist.gate_gradient(dy, *ctx.saved_tensors)
        return dz, dz.sum(0) if ctx.needs_input_grad[1] else None


class _GatedFormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, bias, sums, weight_OI, left_OR, right_RI, kind_name, impl):
        with no_autocast(z.device):
            out = _values(z, bias) @ weight_OI.t()
        ctx.save_for_backward(z, bias, out if ADAPTER_TYPES[kind_name].rows else None, weight_OI, left_OR, right_RI)
        ctx.kind_name, ctx.impl = kind_name, impl
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z, bias, out, weight_OI, left_OR, right_RI = ctx.saved_tensors
        grad_sums = None
        with no_autocast(grad.device):
            dy = grad @ weight_OI
            dz, y = torch.ops.sa3dist.gate_gradient_and_values(dy, z, bias)
            if ctx.needs_input_grad[2]:
                col_operand = dy if ADAPTER_TYPES[ctx.kind_name].cols else None
                grad_sums = raw_sums_op(y, col_operand, grad, out, left_OR, right_RI, ctx.kind_name, ctx.impl)
        return dz, dz.sum(0) if ctx.needs_input_grad[1] else None, grad_sums, None, None, None, None, None
