"""The gradient of a self-attention's packed projection from those of its queries, keys and values, in one pass.

    q = rotate(norm(x_q))      k = rotate(norm(x_k))      v = x_v, shared by the members of a differential pair

with norm(x) = gamma x / sqrt(mean(x^2) + eps) over a head's channels, and rotate(x) = x cos + swap(x) sin, where swap
exchanges the first ``half`` channels with the next ``half``. x holds q, k, v and, of a pair, the second member's q and
k. Compiled, this was two kernels with float32 values between them: 2.5 times the bytes.

Legend: K tokens, S parts of the projection (3; 5 of a pair), P members (1; 2 of a pair), H heads, D channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sa3dist_kernels.triton_support import check_triton, launch_cached

# Tokens and heads of a program's tile.
BLOCK_K, BLOCK_H = 4, 8


class HeadNorm(NamedTuple):
    """The norm and rotation that turn a projection's rows into queries and keys.

    gamma_q_D, gamma_k_D, eps   parameters of the norms
    cos_KD, sin_KD              rotary tables at each token's position, float32; sin is signed
    half                        half the number of rotated channels
    """

    gamma_q_D: torch.Tensor
    gamma_k_D: torch.Tensor
    eps: float
    cos_KD: torch.Tensor
    sin_KD: torch.Tensor
    half: int


def qkv_gradient(
    grads_KPHD: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    x_KSHD: torch.Tensor,
    norm: HeadNorm,
    is_clips_K: torch.Tensor,
    impl: str = "auto",
) -> torch.Tensor:
    """Gradient of x (K, S, H, D), in its dtype; computed in float32 or wider.

    grads_KPHD   gradients of q, k, and of v per member, in the dtype of x; any strides of K, P and H. Those of the
                 second member are passed as if its attention were added; it is subtracted, so they are negated here
    is_clips_K   bool: False for tokens whose gradients are zero, whatever ``grads_KPHD`` hold there, even NaN
    impl         "triton", "torch", or "auto", which is triton on CUDA
    """
    if impl == "torch" or (impl == "auto" and not x_KSHD.is_cuda):
        return qkv_gradient_reference(grads_KPHD, x_KSHD, norm, is_clips_K)
    check_triton(x_KSHD)
    K, S, H, D = x_KSHD.shape
    x_KSHD = x_KSHD.contiguous()
    # The kernel takes channels of a head as contiguous.
    grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads_KPHD]
    out_KSHD = torch.empty_like(x_KSHD)
    arguments = dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True)) | {"x": x_KSHD, "out": out_KSHD, "K": K}
    for name, grad in zip("qkv", grads, strict=True):
        arguments |= zip((f"{name}_k", f"{name}_p", f"{name}_h"), grad.stride(), strict=False)
    grid = triton.cdiv(K, BLOCK_K), triton.cdiv(H, BLOCK_H), S
    launch_cached(_qkv_gradient_kernel, grid, arguments | {"is_clips": is_clips_K} | common_arguments(x_KSHD, norm))
    return out_KSHD


def common_arguments(x_KSHD: torch.Tensor, norm: HeadNorm) -> dict:
    """Arguments that this kernel and ``queries_and_keys`` share: of the norm, x's sizes except K, and block sizes."""
    _, S, H, D = x_KSHD.shape
    tables = {"gamma_q": norm.gamma_q_D, "gamma_k": norm.gamma_k_D}
    tables |= {"cos": norm.cos_KD.contiguous(), "sin": norm.sin_KD.contiguous(), "eps": norm.eps}
    blocks = {"BLOCK_K": BLOCK_K, "BLOCK_H": BLOCK_H, "BLOCK_D": triton.next_power_of_2(D), "num_warps": 4}
    return tables | {"H": H, "D": D, "P": S // 2, "HALF": norm.half} | blocks


def qkv_gradient_reference(grads_KPHD, x_KSHD, norm: HeadNorm, is_clips_K: torch.Tensor) -> torch.Tensor:
    """``qkv_gradient`` in torch."""
    wide = torch.promote_types(x_KSHD.dtype, torch.float32)
    valid = is_clips_K[:, None, None, None]
    grad_q, grad_k, grad_v = (torch.where(valid, grad, grad.new_zeros(())).to(wide) for grad in grads_KPHD)
    cos, sin = (table[:, None, None].to(wide) for table in (norm.cos_KD, norm.sin_KD))
    out_KSHD = torch.empty_like(x_KSHD)
    for part, grad, gamma in ((0, grad_q, norm.gamma_q_D), (1, grad_k, norm.gamma_k_D)):
        x = x_KSHD[:, part::3].to(wide)
        grad = grad * _signs(grad)
        rotated = grad * sin
        first, second, rest = rotated.split([norm.half, norm.half, x.shape[-1] - 2 * norm.half], dim=-1)
        normed_grad = (grad * cos + torch.cat([second, first, rest], dim=-1)) * gamma.to(wide)
        scale = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        along = (normed_grad * x).mean(-1, keepdim=True) * scale.square()
        out_KSHD[:, part::3] = (scale * (normed_grad - x * along)).to(x_KSHD.dtype)
    out_KSHD[:, 2] = (grad_v * _signs(grad_v)).sum(1).to(x_KSHD.dtype)
    return out_KSHD


def _signs(grad_KPHD: torch.Tensor) -> torch.Tensor:
    """1 for the first member, -1 for the second; (P, 1, 1)."""
    return (1 - 2 * torch.arange(grad_KPHD.shape[1], device=grad_KPHD.device))[:, None, None]


@triton.jit(do_not_specialize=["K"])
def _qkv_gradient_kernel(
    grad_q, grad_k, grad_v, x, gamma_q, gamma_k, cos, sin, is_clips, out,
    q_k, q_p, q_h, k_k, k_p, k_h, v_k, v_p, v_h, K, eps,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of tokens and heads of one part of the projection."""
    k = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None, None]
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    part = tl.program_id(2)
    inside = (k < K) & (h < H) & (d < D)
    valid = inside & (tl.load(is_clips + k, mask=k < K, other=0) != 0)
    offsets = ((k * (2 * P + 1) + part) * H + h) * D + d
    if part == 2:
        # Values: the sum over the members.
        result = tl.zeros((BLOCK_K, BLOCK_H, BLOCK_D), tl.float32)
        for member in tl.static_range(P):
            value = tl.load(grad_v + k * v_k + member * v_p + h * v_h + d, mask=valid, other=0.0).to(tl.float32)
            result += value * (1 - 2 * member)
    else:
        # Queries or keys of one member.
        member = part // 3
        if part % 3 == 0:
            rows, gammas = grad_q + k * q_k + member * q_p + h * q_h, gamma_q
        else:
            rows, gammas = grad_k + k * k_k + member * k_p + h * k_h, gamma_k
        swapped = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
        in_tables = (k < K) & (d < D)
        cosine = tl.load(cos + k * D + d, mask=in_tables, other=0.0)
        sine = tl.load(sin + k * D + swapped, mask=in_tables, other=0.0)
        gamma = tl.load(gammas + d, mask=d < D, other=0.0).to(tl.float32)
        grad = tl.load(rows + d, mask=valid, other=0.0).to(tl.float32)
        # A second load, from the L1 cache, is cheaper than exchanging values between threads.
        grad_swapped = tl.load(rows + swapped, mask=valid, other=0.0).to(tl.float32)
        values = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
        normed_grad = (grad * cosine + grad_swapped * sine) * gamma
        scale = tl.rsqrt(tl.sum(values * values, axis=2, keep_dims=True) / D + eps)
        along = tl.sum(normed_grad * values, axis=2, keep_dims=True) / D * scale * scale
        result = scale * (normed_grad - values * along) * (1 - 2 * member)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=inside)
