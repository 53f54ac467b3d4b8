"""Normed and rotated queries and keys of a self-attention, from its packed projection, in one pass.

The equations are in ``qkv_gradient.py``, the backward pass. The compiler's kernel took 61 us where moving the bytes
takes 40 (4155 tokens of the medium model on an H100).

Legend: K tokens, S parts of the projection (3; 5 of a pair), P members (1; 2 of a pair), H heads, D channels of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sa3dist_kernels.qkv_gradient import BLOCK_H, BLOCK_K, HeadNorm, common_arguments
from sa3dist_kernels.triton_support import check_triton, launch_cached


def queries_and_keys(x_KSHD: torch.Tensor, norm: HeadNorm, impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, each (K, P, H, D), contiguous, in the dtype of x; computed in float32 or wider.

    impl   "triton", "torch", or "auto", which is triton on CUDA
    """
    if impl == "torch" or (impl == "auto" and not x_KSHD.is_cuda):
        return queries_and_keys_reference(x_KSHD, norm)
    check_triton(x_KSHD)
    K, S, H, D = x_KSHD.shape
    x_KSHD = x_KSHD.contiguous()
    q_KPHD, k_KPHD = (x_KSHD.new_empty(K, S // 2, H, D) for _ in range(2))
    arguments = {"x": x_KSHD, "out_q": q_KPHD, "out_k": k_KPHD, "K": K}
    grid = triton.cdiv(K, BLOCK_K), triton.cdiv(H, BLOCK_H), S - 1
    launch_cached(_queries_and_keys_kernel, grid, arguments | common_arguments(x_KSHD, norm))
    return q_KPHD, k_KPHD


def queries_and_keys_reference(x_KSHD: torch.Tensor, norm: HeadNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """``queries_and_keys`` in torch."""
    wide = torch.promote_types(x_KSHD.dtype, torch.float32)
    cos, sin = (table[:, None, None].to(wide) for table in (norm.cos_KD, norm.sin_KD))
    results = []
    for part, gamma in ((0, norm.gamma_q_D), (1, norm.gamma_k_D)):
        x = x_KSHD[:, part::3].to(wide)
        normed = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * gamma.to(wide)
        first, second, rest = normed.split([norm.half, norm.half, x.shape[-1] - 2 * norm.half], dim=-1)
        results.append((normed * cos + torch.cat([second, first, rest], dim=-1) * sin).to(x_KSHD.dtype))
    return results[0], results[1]


@triton.jit(do_not_specialize=["K"])
def _queries_and_keys_kernel(
    x, gamma_q, gamma_k, cos, sin, out_q, out_k, K, eps,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of tokens and heads of one member's queries or keys."""
    k = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None, None]
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    member, is_key = tl.program_id(2) // 2, tl.program_id(2) % 2
    inside = (k < K) & (h < H) & (d < D)
    swapped = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    rows = x + ((k * (2 * P + 1) + member * 3 + is_key) * H + h) * D
    if is_key == 0:
        gammas, out = gamma_q, out_q
    else:
        gammas, out = gamma_k, out_k
    in_tables = (k < K) & (d < D)
    cosine = tl.load(cos + k * D + d, mask=in_tables, other=0.0)
    sine = tl.load(sin + k * D + d, mask=in_tables, other=0.0)
    gamma = tl.load(gammas + d, mask=d < D, other=0.0).to(tl.float32)
    gamma_swapped = tl.load(gammas + swapped, mask=d < D, other=0.0).to(tl.float32)
    values = tl.load(rows + d, mask=inside, other=0.0).to(tl.float32)
    # A second load, from the L1 cache, is cheaper than exchanging values between threads.
    values_swapped = tl.load(rows + swapped, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=2, keep_dims=True) / D + eps)
    result = (values * gamma * cosine + values_swapped * gamma_swapped * sine) * scale
    tl.store(out + ((k * P + member) * H + h) * D + d, result.to(out.dtype.element_ty), mask=inside)
