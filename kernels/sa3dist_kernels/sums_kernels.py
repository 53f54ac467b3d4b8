"""Triton kernels of the raw sums (``raw_sums.py``), each for any number of layers.

A program looks up its block and its layer's sizes in tables: see ``sums_plan.py``.

Legend: N tokens, O fan_out, I fan_in, R rank, S token splits.
"""

import triton
import triton.language as tl

from sa3dist_kernels.formed_tiles import loop_to
from sa3dist_kernels.sums_plan import PROGRAM, Side
from sa3dist_kernels.triton_support import dot, one_of

PROGRAM_COUNT, SIDE_COUNT = tl.constexpr(len(PROGRAM)), tl.constexpr(len(Side._fields))
(
    TOKENS, SIZE, STRIDE, PARTNER_STRIDE, CHANNEL_SPAN, CHANNEL_SPLIT_COUNT, PARTIALS, FACTOR_SUMS, MAGNITUDE_SUMS,
    TOKEN_SPAN,
) = map(tl.constexpr, range(len(Side._fields)))  # fmt: skip


@triton.jit
def _program(programs):
    """Layer, side, block and part of this program."""
    row = programs + tl.program_id(0).to(tl.int64) * PROGRAM_COUNT
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _side(sizes, layer, side, NAME: tl.constexpr, MULTIPLE: tl.constexpr):
    """One field of ``Side``; the caller guarantees a multiple of MULTIPLE."""
    return tl.multiple_of(tl.load(sizes + (layer * 2 + side) * SIDE_COUNT + NAME), MULTIPLE)


@triton.jit
def thin_products_kernel(
    xs, dys, rights, lefts, partials, sizes, programs,
    R: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_N: tl.constexpr, WARP_SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A block of tokens of T or U (N, R), float32, summed over one span of channels."""
    layer, side, block, split = _program(programs)
    N, span = _side(sizes, layer, side, TOKENS, 1), _side(sizes, layer, side, CHANNEL_SPAN, BLOCK_K).to(tl.int32)
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    n_mask, r_mask = n < N, r < R
    out = partials + _side(sizes, layer, side, PARTIALS, 16) + (split * N + n[:, None]) * R + r[None, :]
    inside = n_mask[:, None] & r_mask[None, :]
    if side == 0:
        I = _side(sizes, layer, side, SIZE, ALIGN_X).to(tl.int32)
        acc = _partial_product(
            one_of(xs, layer), one_of(rights, layer), split * span, span, n, r, n_mask, r_mask, I,
            _side(sizes, layer, side, STRIDE, ALIGN_X), 1, I,
            LOOP, BLOCK_N, WARP_SPLITS, BLOCK_K, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(out, acc, mask=inside)
    else:
        O = _side(sizes, layer, side, SIZE, ALIGN_Y).to(tl.int32)
        acc = _partial_product(
            one_of(dys, layer), one_of(lefts, layer), split * span, span, n, r, n_mask, r_mask, O,
            _side(sizes, layer, side, STRIDE, ALIGN_Y), R, 1,
            LOOP, BLOCK_N, WARP_SPLITS, BLOCK_K, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(out, acc, mask=inside)


@triton.jit
def _partial_product(
    tokens, factor, first, span, n, r, n_mask, r_mask, size, tokens_n, factor_k, factor_r,
    LOOP: tl.constexpr, BLOCK_N: tl.constexpr, WARP_SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The product of a block of tokens with a thin factor, summed over one span of their ``size`` channels.

    WARP_SPLITS   warps that take neighbouring channels; their sums are added at the end
    """
    end = tl.minimum(size, first + span)
    if WARP_SPLITS == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in tl.range(0, loop_to(span, LOOP), BLOCK_K, num_stages=STAGES):
            k = first + start + tl.arange(0, BLOCK_K)
            k_mask = k < end
            inside = n_mask[:, None] & k_mask[None, :]
            tile = tl.load(tokens + n[:, None] * tokens_n + k[None, :], mask=inside, other=0.0)
            pointers = factor + (k[:, None] * factor_k + r[None, :] * factor_r)
            thin = tl.load(pointers, mask=r_mask[None, :] & k_mask[:, None], other=0.0)
            acc = dot(tile, thin, acc, PRECISION, UPCAST)
        return acc
    else:
        channels = tl.arange(0, WARP_SPLITS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        acc = tl.zeros((WARP_SPLITS, BLOCK_N, BLOCK_R), tl.float32)
        for start in tl.range(0, loop_to(span, LOOP), WARP_SPLITS * BLOCK_K, num_stages=STAGES):
            k = first + start + channels
            k_mask = k < end
            inside = n_mask[None, :, None] & k_mask[:, None, :]
            tile = tl.load(tokens + n[None, :, None] * tokens_n + k[:, None, :], mask=inside, other=0.0)
            pointers = factor + (k[:, :, None] * factor_k + r[None, None, :] * factor_r)
            thin = tl.load(pointers, mask=r_mask[None, None, :] & k_mask[:, :, None], other=0.0)
            acc = dot(tile, thin, acc, PRECISION, UPCAST)
        return tl.sum(acc, axis=0)


@triton.jit
def _add_splits(partials, n, r, N, splits, mask, R: tl.constexpr, CHANNEL_SPLITS: tl.constexpr):
    """T or U at (n, r): the sum of its ``splits``, at most CHANNEL_SPLITS."""
    offsets = n[:, None] * R + r[None, :]
    total = tl.load(partials + offsets, mask=mask, other=0.0)
    for split in tl.static_range(1, CHANNEL_SPLITS):
        total += tl.load(partials + split * N * R + offsets, mask=mask & (split < splits), other=0.0)
    return total


@triton.jit
def raw_sums_kernel(
    xs, dxs, dys, zs, partials, out, sizes, programs, total,
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, XS: tl.constexpr, CHANNEL_SPLITS: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_Y: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P1 and s_g of a block of outputs, or P2 and s_h of a block of inputs, over one span of tokens; to ``out``."""
    layer, side, block, split = _program(programs)
    rank = tl.program_id(1)
    r = rank * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    N = _side(sizes, layer, side, TOKENS, 1)
    span = _side(sizes, layer, side, TOKEN_SPAN, BLOCK_N).to(tl.int32)
    row = out + split.to(tl.int64) * total
    factor_sums = row + _side(sizes, layer, side, FACTOR_SUMS, 1)
    magnitude_sums = row + _side(sizes, layer, side, MAGNITUDE_SUMS, 1)
    # P1 is a product with T, which is the inputs' side, and P2 with U.
    thin = partials + _side(sizes, layer, 1 - side, PARTIALS, 16)
    splits = _side(sizes, layer, 1 - side, CHANNEL_SPLIT_COUNT, 1)
    if side == 1:
        O = _side(sizes, layer, side, SIZE, ALIGN_Y).to(tl.int32)
        m_mask = m < O
        acc, magnitude_sum = _block_sums(
            one_of(dys, layer), one_of(zs, layer), thin, m, m_mask, r, r_mask, split, span, N, splits,
            _side(sizes, layer, side, STRIDE, ALIGN_Y), _side(sizes, layer, side, PARTNER_STRIDE, ALIGN_Y),
            R, ROWS, XS, CHANNEL_SPLITS, LOOP, BLOCK_N, BLOCK_M, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        if not XS:
            tl.store(factor_sums + m[:, None] * R + r[None, :], acc, mask=m_mask[:, None] & r_mask[None, :])
        if ROWS and rank == 0:
            tl.store(magnitude_sums + m, magnitude_sum, mask=m_mask)
    else:
        I = _side(sizes, layer, side, SIZE, ALIGN_X).to(tl.int32)
        m_mask = m < I
        acc, magnitude_sum = _block_sums(
            one_of(xs, layer), one_of(dxs, layer), thin, m, m_mask, r, r_mask, split, span, N, splits,
            _side(sizes, layer, side, STRIDE, ALIGN_X), _side(sizes, layer, side, PARTNER_STRIDE, ALIGN_X),
            R, COLS, XS, CHANNEL_SPLITS, LOOP, BLOCK_N, BLOCK_M, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        if not XS:
            tl.store(factor_sums + r[None, :] * I + m[:, None], acc, mask=m_mask[:, None] & r_mask[None, :])
        if COLS and rank == 0:
            tl.store(magnitude_sums + m, magnitude_sum, mask=m_mask)


@triton.jit
def _block_sums(
    values, partner, partials, m, m_mask, r, r_mask, split, span, N, splits, values_n, partner_n,
    R: tl.constexpr, MAGNITUDE: tl.constexpr, XS: tl.constexpr, CHANNEL_SPLITS: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """For channels ``m`` and a span of tokens: values^T T (or U) unless XS; sum_n values .* partner if MAGNITUDE."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    magnitude_sum = tl.zeros((BLOCK_M,), tl.float32)
    end = tl.minimum(N, (split + 1) * span)
    for start in tl.range(0, loop_to(span, LOOP), BLOCK_N, num_stages=STAGES):
        n = (split * span + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < end)[:, None] & m_mask[None, :]
        tile = tl.load(values + n[:, None] * values_n + m[None, :], mask=inside, other=0.0)
        if MAGNITUDE:
            other = tl.load(partner + n[:, None] * partner_n + m[None, :], mask=inside, other=0.0)
            magnitude_sum += tl.sum(tile.to(tl.float32) * other.to(tl.float32), axis=0)
        if not XS:
            mask = (n < end)[:, None] & r_mask[None, :]
            thin = _add_splits(partials, n, r, N, splits, mask, R, CHANNEL_SPLITS).to(tile.dtype)
            acc = dot(tl.trans(tile), thin, acc, PRECISION, UPCAST)
    return acc, magnitude_sum


@triton.jit
def core_sums_kernel(
    partials, out, sizes, programs, total,
    R: tl.constexpr, CHANNEL_SPLITS: tl.constexpr, LOOP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of PM over one span of tokens, float32; to ``out`` (S, total)."""
    layer, down, across, split = _program(programs)
    i, j = down * BLOCK_R + tl.arange(0, BLOCK_R), across * BLOCK_R + tl.arange(0, BLOCK_R)
    N, span = _side(sizes, layer, 0, TOKENS, 1), _side(sizes, layer, 0, TOKEN_SPAN, BLOCK_N).to(tl.int32)
    us, ts = partials + _side(sizes, layer, 1, PARTIALS, 16), partials + _side(sizes, layer, 0, PARTIALS, 16)
    u_splits = _side(sizes, layer, 1, CHANNEL_SPLIT_COUNT, 1)
    t_splits = _side(sizes, layer, 0, CHANNEL_SPLIT_COUNT, 1)
    end = tl.minimum(N, (split + 1) * span)
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for start in range(0, loop_to(span, LOOP), BLOCK_N):
        n = (split * span + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        u = _add_splits(us, n, i, N, u_splits, (n < end)[:, None] & (i < R)[None, :], R, CHANNEL_SPLITS)
        t = _add_splits(ts, n, j, N, t_splits, (n < end)[:, None] & (j < R)[None, :], R, CHANNEL_SPLITS)
        acc = tl.dot(tl.trans(u), t, acc, input_precision="ieee")
    pointers = out + split.to(tl.int64) * total + _side(sizes, layer, 0, FACTOR_SUMS, 1) + i[:, None] * R + j[None, :]
    tl.store(pointers, acc, mask=(i < R)[:, None] & (j < R)[None, :])
