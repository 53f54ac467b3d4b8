"""One read of a frozen weight: its product with a thin factor and the sums of its squares, for BoRA's column norms.

    cross = thin^T weight        totals = squares (weight o weight)

With W0 itself the two give L_g^T W0 and g^2 W0^2; with its transpose, (W0 Rq^T)^T and W0^2 q. Sums over the weight's
long side are shared by several programs and added afterwards in a fixed order, so that two runs agree to the last bit.

Layouts: K and M the two sides of the weight, R rank, S spans of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sa3dist_kernels.triton_support import check_triton, interpreting, loop_end, rank_block

# Programs of one launch: two for each of an H200's 132 multiprocessors.
PROGRAMS = 264


def weight_pass_reference(weight_KM, thin_KR, squares_K):
    """The maths, in the format of ``thin``: (cross_RM, totals_M)."""
    weight_KM = weight_KM.to(thin_KR.dtype)
    return thin_KR.t() @ weight_KM, squares_K @ weight_KM.square()


@triton.jit
def _weight_pass_kernel(
    weight, thin, squares, cross, totals, M, K, R, span, weight_k, weight_m, thin_k, thin_r,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One span's share of a block of columns: cross is (S, R, M), totals (S, M)."""
    split = tl.program_id(1)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    r = (tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_mask, r_mask = m < M, r < R
    acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, span, BLOCK_K):
        k = (split * span + start + tl.arange(0, BLOCK_K)).to(tl.int64)
        k_mask = k < K
        columns = weight + k[:, None] * weight_k + m[None, :] * weight_m
        tile = tl.load(columns, mask=k_mask[:, None] & m_mask[None, :], other=0.0).to(tl.float32)
        factors = thin + r[:, None] * thin_r + k[None, :] * thin_k
        factor = tl.load(factors, mask=r_mask[:, None] & k_mask[None, :], other=0.0)
        acc = tl.dot(factor, tile, acc, input_precision=PRECISION)
        total += tl.sum(tl.load(squares + k, mask=k_mask, other=0.0)[:, None] * tile * tile, axis=0)
    rows = split.to(tl.int64) * R + r
    tl.store(cross + rows[:, None] * M + m[None, :], acc, mask=r_mask[:, None] & m_mask[None, :])
    if tl.program_id(2) == 0:
        tl.store(totals + split.to(tl.int64) * M + m, total, mask=m_mask)


def weight_pass(
    weight_KM: torch.Tensor, thin_KR: torch.Tensor, squares_K: torch.Tensor, *, impl: str = "triton"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``thin^T @ weight`` (R, M) and ``squares @ weight^2`` (M,), both float32, reading the weight once.

    weight_KM  float32, float16 or bfloat16, any strides; thin_KR, squares_K  float32
    impl       "triton", or "torch" for the reference
    """
    if impl == "torch":
        return weight_pass_reference(weight_KM, thin_KR, squares_K)
    check_triton(weight_KM)
    (K, M), R = weight_KM.shape, thin_KR.shape[1]
    block_m, block_k = (16, 16) if interpreting() else (64, 32)
    blocks = triton.cdiv(M, block_m), triton.cdiv(R, rank_block(R))
    splits = max(1, min(triton.cdiv(PROGRAMS, blocks[0] * blocks[1]), triton.cdiv(K, 4 * block_k)))
    span = triton.cdiv(triton.cdiv(K, splits), block_k) * block_k
    cross = thin_KR.new_empty(splits, R, M)
    totals = thin_KR.new_empty(splits, M)
    _weight_pass_kernel[(blocks[0], splits, blocks[1])](
        weight_KM, thin_KR, squares_K.contiguous(), cross, totals,
        M, K, R, loop_end(span), *weight_KM.stride(), *thin_KR.stride(),
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=rank_block(R),
        # Statistics stay float32: three TF32 products carry 21 bits; a narrow weight is exact in one of them.
        PRECISION="ieee" if weight_KM.dtype == torch.float32 else "tf32x3", num_warps=4,
    )  # fmt: skip
    return cross.sum(0), totals.sum(0)
