"""Norms of the rows (or columns) of W0 + s L R from thin products, their gains, and the gradient they send back.

One side at a time, written for the rows; for columns factor is R^T and gram is that of L (BoRA: of diag(g^2) L and L):

    squares_i = |row i of W0|^2 + s inner_i . factor_i        inner = 2 cross + s factor gram
    norms = sqrt(max(squares, 0))        gain = magnitude / (norms + eps)
    gradient of the factor = s slope o (cross + s factor gram)

Each is one launch over N x R numbers instead of a dozen.

Layouts: D the side whose norms are taken, R rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa3dist_kernels.triton_support import check_triton, interpreting, loop_end, rank_block


def thin_norms_reference(cross_DR, factor_DR, gram_RR, squares_D, magnitude_D, scale, eps):
    """The maths, in the format of its arguments: (gain_D, norms_D)."""
    inner = 2 * cross_DR + scale * (factor_DR @ gram_RR)
    # Clamped: where a row nearly vanishes, rounding can leave the sum of its three terms below zero.
    norms = (squares_D + scale * (inner * factor_DR).sum(1)).clamp_min(0).sqrt()
    return magnitude_D / (norms + eps), norms


def thin_norms_backward_reference(cross_DR, factor_DR, gram_RR, slope_D, scale):
    """The gradient of the factor (D, R)."""
    return scale * slope_D[:, None] * (cross_DR + scale * (factor_DR @ gram_RR))


@triton.jit
def _tile(matrix, d, r, D, R, stride_d, stride_r):
    return tl.load(
        matrix + d[:, None] * stride_d + r[None, :] * stride_r, mask=(d < D)[:, None] & (r < R)[None, :], other=0.0
    )


@triton.jit
def _thin_norms_kernel(
    cross, factor, gram, squares, magnitude, slope, gain, norms, grad, D, R, scale, eps,
    cross_d, cross_r, factor_d, factor_r, gram_d, gram_r,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gain and norms of one block of rows or, with a slope, the gradient of their factor."""
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
        for first in range(0, R, BLOCK_R):
            q = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
            left = _tile(factor, d, q, D, R, factor_d, factor_r)
            acc = tl.dot(left, _tile(gram, q, r, R, R, gram_d, gram_r), acc, input_precision="ieee")
        crossed = _tile(cross, d, r, D, R, cross_d, cross_r)
        if slope is not None:
            slopes = scale * tl.load(slope + d, mask=d < D, other=0.0)
            inside = (d < D)[:, None] & (r < R)[None, :]
            tl.store(grad + d[:, None] * R + r[None, :], slopes[:, None] * (crossed + scale * acc), mask=inside)
        else:
            total += tl.sum((2 * crossed + scale * acc) * _tile(factor, d, r, D, R, factor_d, factor_r), axis=1)
    if slope is None:
        found = tl.load(squares + d, mask=d < D, other=0.0) + scale * total
        # A NaN stays one: the comparison is false for it.
        length = tl.sqrt(tl.where(found < 0, 0.0, found))
        tl.store(norms + d, length, mask=d < D)
        tl.store(gain + d, tl.load(magnitude + d, mask=d < D, other=0.0) / (length + eps), mask=d < D)


def _launch(cross_DR, factor_DR, gram_RR, scale, eps, **tensors) -> None:
    D, R = factor_DR.shape
    block_d = 16 if interpreting() else 32
    named = {name: tensors.get(name) for name in ("squares", "magnitude", "slope", "gain", "norms", "grad")}
    _thin_norms_kernel[(triton.cdiv(D, block_d),)](
        cross_DR, factor_DR, gram_RR, *named.values(), D, loop_end(R), scale, eps,
        *cross_DR.stride(), *factor_DR.stride(), *gram_RR.stride(),
        BLOCK_D=block_d, BLOCK_R=min(32, rank_block(R)), num_warps=4,
    )  # fmt: skip


def thin_norms(cross_DR, factor_DR, gram_RR, squares_D, magnitude_D, scale: float, eps: float, *, impl="triton"):
    """(gain (D,), norms (D,)) of one side of W0 + s L R, float32.

    cross_DR     W0 times the other factor; factor_DR  this side's; gram_RR  the other's inner products; any strides
    squares_D    squared norms of W0; scale  alpha / rank; impl  "triton", or "torch" for the reference
    """
    if impl == "torch":
        return thin_norms_reference(cross_DR, factor_DR, gram_RR, squares_D, magnitude_D, scale, eps)
    check_triton(cross_DR)
    gain, norms = cross_DR.new_empty(squares_D.shape), cross_DR.new_empty(squares_D.shape)
    sides = {"squares": squares_D.contiguous(), "magnitude": magnitude_D.contiguous()}
    _launch(cross_DR, factor_DR, gram_RR, scale, eps, **sides, gain=gain, norms=norms)
    return gain, norms


def thin_norms_backward(cross_DR, factor_DR, gram_RR, slope_D, scale: float, *, impl="triton"):
    """Gradient (D, R) of the factor, from what ``row_slope`` made of the gain's gradient; arguments as above."""
    if impl == "torch":
        return thin_norms_backward_reference(cross_DR, factor_DR, gram_RR, slope_D, scale)
    check_triton(cross_DR)
    grad = cross_DR.new_empty(factor_DR.shape)
    _launch(cross_DR, factor_DR, gram_RR, scale, 0.0, slope=slope_D.contiguous(), grad=grad)
    return grad
