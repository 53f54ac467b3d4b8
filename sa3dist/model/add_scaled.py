"""Multiply-add of tokens with values of their clips, with gradients summed in a fixed order.

Legend: B clips, K tokens of all clips in one list, E width.
"""

import torch
from torch import Tensor


class _AddScaled(torch.autograd.Function):
    """``base + x * factor[clip]`` per token, with ``base`` per token or per clip. Of per-token tensors only x is saved.

    base (1, K, E) or (B, E)    x (1, K, E)    factor (B, E)    clip_K, owner_BK  see Packed
    """

    @staticmethod
    def forward(ctx, base, x, factor, clip_K, owner_BK):
        ctx.save_for_backward(x, factor, clip_K, owner_BK)
        ctx.base_per_clip = base.ndim == 2
        if ctx.base_per_clip:
            base = base.index_select(0, clip_K)
        return torch.addcmul(base, x, factor.index_select(0, clip_K))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, factor, clip_K, owner_BK = ctx.saved_tensors
        needs_base, needs_x, needs_factor = ctx.needs_input_grad[:3]
        grad_base = grad_x = grad_factor = None
        if needs_base:
            grad_base = _sum_per_clip(grad, owner_BK) if ctx.base_per_clip else grad
        if needs_x:
            grad_x = grad * factor.index_select(0, clip_K)
        if needs_factor:
            grad_factor = _sum_per_clip(grad * x, owner_BK)
        return grad_base, grad_x, grad_factor, None, None


def add_scaled(base: Tensor, x_1KE: Tensor, factor_BE: Tensor, clip_K: Tensor, owner_BK: Tensor) -> Tensor:
    """``base + x * factor[clip]`` per token, differentiable; see ``_AddScaled``."""
    return _AddScaled.apply(base, x_1KE, factor_BE, clip_K, owner_BK)


def _sum_per_clip(values_1KE: Tensor, owner_BK: Tensor) -> Tensor:
    # float32 on a CPU: without bfloat16 instructions the product would be emulated.
    dtype = torch.float32 if values_1KE.device.type == "cpu" and values_1KE.dtype.itemsize == 2 else values_1KE.dtype
    # The compiler traces backward passes under the forward pass's autocast.
    with torch.autocast(values_1KE.device.type, enabled=False):
        return (owner_BK.to(dtype) @ values_1KE[0].to(dtype)).to(values_1KE.dtype)
