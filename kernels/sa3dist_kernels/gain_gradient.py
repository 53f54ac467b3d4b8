"""Gradient of a row gain, read off the layer's output: the product that the gain scaled need not be kept.

    y = g p + b      dg = sum_tokens dy p = sum_tokens dy (y - b) / g

p takes N x M numbers per layer; y is kept by whatever consumes it. As y is rounded once, as a kept p would be, the
quotient carries the same relative error, times |y| / |g p| where a bias stands beside a small product. One pass sums

    e = sum dy (y - b)      a = sum (dy y)^2      c = sum (dy (y - b))^2

and a column whose rounding the bias has blown up (a > 16 c: 4 times, root mean square), or whose gain vanishes, is
computed from p itself, made anew for that column alone. Columns are chosen on the device: nothing waits for it.

Layouts: N tokens, K and M the two sides of the weight, R rank, S spans of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sa3dist_kernels.scaled_matmul import add_low_rank, add_product
from sa3dist_kernels.triton_support import check_triton, dot_precision, interpreting, loop_end, rank_block

# Below this, y may have left float16's normal range where p had not.
LEAST_GAIN = 2.0**-10
# Square of the factor by which the bias may raise the rounding error of a column.
LIMIT = 16.0
# Programs of one launch: four for each of an H200's 132 multiprocessors.
PROGRAMS = 528


def gain_gradient_reference(grad_NM, left_NK, weight_KM, left_gain_K, thin_NR, lift_RM, alpha):
    """The maths from p itself, in the widest format among the arguments."""
    scaled = left_NK if left_gain_K is None else left_NK * left_gain_K
    dtype = torch.promote_types(torch.promote_types(scaled.dtype, lift_RM.dtype), weight_KM.dtype)
    product = scaled.to(dtype) @ weight_KM.to(dtype) + alpha * (thin_NR.to(dtype) @ lift_RM.to(dtype))
    return (grad_NM * product).sum(0)


@triton.jit(do_not_specialize=["N", "span"])
def _sums_kernel(grad, y, bias, sums, N, M, span, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """e, and with a bias a and c, of one block of columns over one span of tokens: sums is (3, S, M) or (1, S, M)."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask, m64 = m < M, m.to(tl.int64)
    inner = tl.zeros((BLOCK_M,), tl.float32)
    seen = tl.zeros((BLOCK_M,), tl.float32)
    free = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, span, BLOCK_N):
        n = split * span + start + tl.arange(0, BLOCK_N)
        offsets = n.to(tl.int64)[:, None] * M + m64[None, :]
        inside = (n < N)[:, None] & m_mask[None, :]
        upstream = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        whole = upstream * tl.load(y + offsets, mask=inside, other=0.0).to(tl.float32)
        part = whole
        if bias is not None:
            part = whole - upstream * tl.load(bias + m64, mask=m_mask, other=0.0).to(tl.float32)[None, :]
            seen += tl.sum(whole * whole, axis=0)
            free += tl.sum(part * part, axis=0)
        inner += tl.sum(part, axis=0)
    row = sums + split.to(tl.int64) * M + m64
    tl.store(row, inner, mask=m_mask)
    if bias is not None:
        tl.store(row + splits.to(tl.int64) * M, seen, mask=m_mask)
        tl.store(row + 2 * splits.to(tl.int64) * M, free, mask=m_mask)


@triton.jit(do_not_specialize=["N", "span"])
def _gain_gradient_kernel(
    grad, sums, gain, left, weight, left_gain, thin, lift, out, N, M, K, R, span, splits, alpha,
    weight_k, weight_m, lift_r, lift_m, HAS_BIAS: tl.constexpr, LEAST_GAIN: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One span's share of dg for one block of columns, out (S, M): the first span's holds e / g, p is summed by all."""
    split = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask, m64 = m < M, m.to(tl.int64)
    inner = tl.zeros((BLOCK_M,), tl.float32)
    seen = tl.zeros((BLOCK_M,), tl.float32)
    free = tl.zeros((BLOCK_M,), tl.float32)
    for row in range(splits):
        offsets = row * M + m64
        inner += tl.load(sums + offsets, mask=m_mask, other=0.0)
        if HAS_BIAS:
            seen += tl.load(sums + splits * M + offsets, mask=m_mask, other=0.0)
            free += tl.load(sums + 2 * splits * M + offsets, mask=m_mask, other=0.0)
    gains = tl.load(gain + m64, mask=m_mask, other=1.0)
    lost = tl.abs(gains) < LEAST_GAIN
    if HAS_BIAS:
        lost = lost | (seen > LIMIT * free)
    result = tl.where(lost | (split > 0), 0.0, inner / tl.where(lost, 1.0, gains))
    if tl.max(lost.to(tl.int32), axis=0) > 0:
        exact = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, span, BLOCK_N):
            n = (split * span + start + tl.arange(0, BLOCK_N)).to(tl.int64)
            n_mask = n < N
            acc = add_product(
                tl.zeros((BLOCK_N, BLOCK_M), tl.float32), n, m64, n_mask, m_mask, left, weight, left_gain, True,
                K, weight_k, weight_m, BLOCK_K, False, PRECISION, UPCAST,
            )  # fmt: skip
            acc = add_low_rank(
                acc, n, m64, n_mask, m_mask, thin, lift, R, alpha, lift_r, lift_m, BLOCK_R, PRECISION, UPCAST
            )  # fmt: skip
            inside = n_mask[:, None] & m_mask[None, :]
            upstream = tl.load(grad + n[:, None] * M + m64[None, :], mask=inside, other=0.0).to(tl.float32)
            exact += tl.sum(acc * upstream, axis=0)
        result = tl.where(lost, exact, result)
    tl.store(out + split.to(tl.int64) * M + m64, result, mask=m_mask)


def gain_gradient(
    grad_NM: torch.Tensor,
    y_NM: torch.Tensor,
    gain_M: torch.Tensor,
    bias_M: torch.Tensor | None,
    left_NK: torch.Tensor,
    weight_KM: torch.Tensor,
    thin_NR: torch.Tensor,
    lift_RM: torch.Tensor,
    alpha: float,
    *,
    left_gain_K: torch.Tensor | None = None,
    impl: str = "triton",
) -> torch.Tensor:
    """Gradient of ``gain`` (M,) in float32, where ``y = gain * product + bias`` and dy is ``grad``.

    grad_NM, y_NM   contiguous, of one format
    the others      what made ``product``: the arguments of ``scaled_matmul`` by the same names
    impl            "triton", or "torch" for the reference, which makes ``product`` again
    """
    if impl == "torch":
        return gain_gradient_reference(grad_NM, left_NK, weight_KM, left_gain_K, thin_NR, lift_RM, alpha)
    check_triton(grad_NM)
    (tokens, M), K, rank = grad_NM.shape, left_NK.shape[1], lift_RM.shape[0]
    block_n, block_m, block_k = (16, 16, 16) if interpreting() else (32, 128, 64)
    column_blocks = triton.cdiv(M, block_m)
    splits = max(1, min(triton.cdiv(PROGRAMS, column_blocks), triton.cdiv(tokens, block_n)))
    span = triton.cdiv(triton.cdiv(tokens, splits), block_n) * block_n
    sums = grad_NM.new_empty(1 if bias_M is None else 3, splits, M, dtype=torch.float32)
    _sums_kernel[(column_blocks, splits)](
        grad_NM, y_NM, bias_M, sums, tokens, M, loop_end(span), BLOCK_N=block_n, BLOCK_M=block_m, num_warps=4
    )
    out = grad_NM.new_empty(splits, M, dtype=torch.float32)
    block_m = min(block_m, 32)
    _gain_gradient_kernel[(triton.cdiv(M, block_m), splits)](
        grad_NM, sums, gain_M, left_NK, weight_KM, left_gain_K, thin_NR, lift_RM, out,
        tokens, M, loop_end(K), loop_end(rank), loop_end(span), loop_end(splits), alpha,
        *weight_KM.stride(), *lift_RM.stride(),
        HAS_BIAS=bias_M is not None, LEAST_GAIN=LEAST_GAIN, LIMIT=LIMIT,
        BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=rank_block(rank),
        PRECISION=dot_precision(), UPCAST=interpreting(), num_warps=4,
    )  # fmt: skip
    return out.sum(0)
