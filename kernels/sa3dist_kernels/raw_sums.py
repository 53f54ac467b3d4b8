"""The sums over tokens that a layer's gradients are made of, beside the layer's two library products.

With x (N, I), dy (N, O) its output's gradient, z = x W'^T, dx = dy W', and the factors L' (O, R), R' (R, I) of one
optimiser step (``formed_weights``):

    T = x R'^T        U = dy L'
    P1 = dy^T T (O, R)      P2 = U^T x (R, I)       types that train both factors
    PM = U^T T (R, R)                               -xs types
    s_g = sum_n dy .* z (O)     s_h = sum_n x .* dx (I)      row and column magnitudes

They have the shapes of the trained tensors and stand for their gradients until ``FormedWeights.finish``. Two launches
and, where the tokens are shared out over programs, a third that adds up; always in one fixed order, without atomics.
Source: spec/formed.md section 2.

Legend: N tokens, O fan_out, I fan_in, R rank, S shares of a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.sums_plan import plan_of
from sa3dist_kernels.triton_support import ALIGNMENT, check_triton, dot, dot_precision, launch


def raw_sums_reference(x, dx, dy, z, left_OR, right_RI, kind: AdapterType) -> torch.Tensor:
    """The maths; products in the operands' format, sums in float32 or the wider format of the operands."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    down, up = x @ right_RI.t(), dy @ left_OR
    if kind.xs:
        parts = [up.to(wide).t() @ down.to(wide)]
    else:
        parts = [up.to(wide).t() @ x.to(wide), dy.to(wide).t() @ down.to(wide)]
    if kind.rows:
        parts.append((dy.to(wide) * z.to(wide)).sum(0))
    if kind.cols:
        parts.append((x.to(wide) * dx.to(wide)).sum(0))
    return torch.cat([part.flatten() for part in parts])


@triton.jit(do_not_specialize=["N"])
def _thin_products_kernel(
    x, dy, right, left, down, up, N, I, O, R, x_n, dy_n, x_share, y_share,
    X_SHARES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Shares of T (S, N, R) in ``down`` and of U in ``up``, float32: one block of tokens, one span of I or of O."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    n_mask, r_mask = n < N, r < R
    inside = n_mask[:, None] & r_mask[None, :]
    share = tl.program_id(1)
    if share < X_SHARES:
        acc = _product_share(
            x, right, share * x_share, x_share, n, r, n_mask, r_mask, I, x_n, 1, I,
            BLOCK_N, BLOCK_K, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(down + (share * N + n[:, None]) * R + r[None, :], acc, mask=inside)
    else:
        share -= X_SHARES
        acc = _product_share(
            dy, left, share * y_share, y_share, n, r, n_mask, r_mask, O, dy_n, R, 1,
            BLOCK_N, BLOCK_K, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(up + (share * N + n[:, None]) * R + r[None, :], acc, mask=inside)


@triton.jit
def _product_share(
    tokens, factor, first, span, n, r, n_mask, r_mask, size, tokens_n, factor_k, factor_r,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The product of a block of tokens with a thin factor, summed over one span of their ``size`` channels."""
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in tl.range(0, span, BLOCK_K, num_stages=STAGES):
        k = first + start + tl.arange(0, BLOCK_K)
        k_mask = k < size
        tile = tl.load(tokens + n[:, None] * tokens_n + k[None, :], mask=n_mask[:, None] & k_mask[None, :], other=0.0)
        place = factor + (k[:, None] * factor_k + r[None, :] * factor_r)
        thin = tl.load(place, mask=r_mask[None, :] & k_mask[:, None], other=0.0)
        acc = dot(tile, thin, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _summed(parts, n, r, N, R, mask, SHARES: tl.constexpr):
    """T or U at (n, r), from its shares."""
    place = n[:, None] * R + r[None, :]
    total = tl.load(parts + place, mask=mask, other=0.0)
    for share in tl.static_range(1, SHARES):
        total += tl.load(parts + share * N * R + place, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["N", "span", "total"])
def _raw_sums_kernel(
    x, dx, dy, z, down, up, out, N, I, O, R, span, total, x_n, dx_n, dy_n, z_n, y_blocks,
    at_a, at_b, at_rows, at_cols,
    ROWS: tl.constexpr, COLS: tl.constexpr, XS: tl.constexpr, X_SHARES: tl.constexpr, Y_SHARES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of outputs (P1, s_g) or of inputs (P2, s_h) over one span of tokens, into ``out`` (S, total)."""
    block, split, rank = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = rank * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    mine = out + split.to(tl.int64) * total
    if block < y_blocks:
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        m_mask = m < O
        acc, gain = _block_sums(
            dy, z, down, m, m_mask, r, r_mask, split, span, N, R, dy_n, z_n,
            ROWS, XS, X_SHARES, BLOCK_N, BLOCK_M, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        if not XS:
            tl.store(mine + at_b + m[:, None] * R + r[None, :], acc, mask=m_mask[:, None] & r_mask[None, :])
        if ROWS and rank == 0:
            tl.store(mine + at_rows + m, gain, mask=m_mask)
    else:
        m = (block - y_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_mask = m < I
        acc, gain = _block_sums(
            x, dx, up, m, m_mask, r, r_mask, split, span, N, R, x_n, dx_n,
            COLS, XS, Y_SHARES, BLOCK_N, BLOCK_M, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        if not XS:
            tl.store(mine + at_a + r[None, :] * I + m[:, None], acc, mask=m_mask[:, None] & r_mask[None, :])
        if COLS and rank == 0:
            tl.store(mine + at_cols + m, gain, mask=m_mask)


@triton.jit
def _block_sums(
    values, made, parts, m, m_mask, r, r_mask, split, span, N, R, values_n, made_n,
    GAIN: tl.constexpr, XS: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Over one span of tokens, of the channels ``m``: values^T T (or U), and the sums of values .* made if GAIN."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    gain = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, span, BLOCK_N, num_stages=STAGES):
        n = (split * span + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < N)[:, None] & m_mask[None, :]
        tile = tl.load(values + n[:, None] * values_n + m[None, :], mask=inside, other=0.0)
        if GAIN:
            other = tl.load(made + n[:, None] * made_n + m[None, :], mask=inside, other=0.0)
            gain += tl.sum(tile.to(tl.float32) * other.to(tl.float32), axis=0)
        if not XS:
            thin = _summed(parts, n, r, N, R, (n < N)[:, None] & r_mask[None, :], SHARES).to(tile.dtype)
            acc = dot(tl.trans(tile), thin, acc, PRECISION, UPCAST)
    return acc, gain


@triton.jit(do_not_specialize=["N", "span", "total"])
def _core_sums_kernel(
    down, up, out, N, R, span, total,
    X_SHARES: tl.constexpr, Y_SHARES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """PM over one span of tokens, float32: one block of its rows and one of its columns, into ``out`` (S, total)."""
    split = tl.program_id(0)
    i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for start in range(0, span, BLOCK_N):
        n = (split * span + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        ups = _summed(up, n, i, N, R, (n < N)[:, None] & (i < R)[None, :], Y_SHARES)
        downs = _summed(down, n, j, N, R, (n < N)[:, None] & (j < R)[None, :], X_SHARES)
        acc = tl.dot(tl.trans(ups), downs, acc, input_precision="ieee")
    place = out + split.to(tl.int64) * total + i[:, None] * R + j[None, :]
    tl.store(place, acc, mask=(i < R)[:, None] & (j < R)[None, :])


def raw_sums(
    x: torch.Tensor,
    dx: torch.Tensor | None,
    dy: torch.Tensor,
    z: torch.Tensor | None,
    left_OR: torch.Tensor,
    right_RI: torch.Tensor,
    kind: AdapterType,
    *,
    impl: str = "triton",
) -> torch.Tensor:
    """All sums of one layer and micro batch in one float32 vector, in the order of ``kind.parameter_shapes``.

    x, dy             (N, I), (N, O); dx, z likewise, needed for column and for row types only. One format
    left_OR, right_RI L' and R' (or Q^T diag(h) of -xs types), contiguous, in that format
    impl              "triton", or "torch" for the reference
    """
    if impl == "torch":
        return raw_sums_reference(x, dx, dy, z, left_OR, right_RI, kind)
    check_triton(dy)
    as_planned = _as_planned(x, dx, dy, z, left_OR, right_RI)
    if not as_planned:
        x, dx, dy, z = (_rows_contiguous(value) for value in (x, dx, dy, z))
    (N, I), (O, R) = x.shape, left_OR.shape
    plan = plan_of(N, I, O, R, kind, x.dtype, dot_precision())
    kept = plan.kept if as_planned else None
    down, up = (x.new_empty(count, N, R, dtype=torch.float32) for count in plan.shares)
    given = x, dy, right_RI, left_OR, down, up, N, I, O, R, x.stride(0), dy.stride(0), *plan.thin_spans
    launch(_thin_products_kernel, plan.thin_grid, given, plan.thin, kept)
    out = x.new_empty(plan.splits, plan.total, dtype=torch.float32)
    if kind.xs:
        launch(_core_sums_kernel, plan.core_grid, (down, up, out, N, R, plan.span, plan.total), plan.core, kept)
    if plan.sums_grid[0]:
        strides = x.stride(0), 0 if dx is None else dx.stride(0), dy.stride(0), 0 if z is None else z.stride(0)
        given = x, dx, dy, z, down, up, out, N, I, O, R, plan.span, plan.total, *strides, *plan.places
        launch(_raw_sums_kernel, plan.sums_grid, given, plan.sums, kept)
    return out[0] if plan.splits == 1 else out.sum(0)


def _as_planned(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether Triton would take the same kernel for all operands like these with one plan.

    It chooses by formats, strides and whether memory begins at 16 bytes. What is allocated here always does.
    """
    dtype, places = x.dtype, x.data_ptr() if x.is_contiguous() else 1
    for value in others:
        if value is not None:
            places |= value.data_ptr() if value.dtype is dtype and value.is_contiguous() else 1
    return places % ALIGNMENT == 0


def _rows_contiguous(value: torch.Tensor | None) -> torch.Tensor | None:
    return value if value is None or value.stride(1) == 1 else value.contiguous()
