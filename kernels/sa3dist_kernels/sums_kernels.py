"""The kernels of the raw sums (``raw_sums.py``), each for any number of layers.

A program finds its layer in a table, and there what it needs to know of it: see ``sums_plan.py``.

Legend: N tokens, O fan_out, I fan_in, R rank, S shares of a sum.
"""

import triton
import triton.language as tl

from sa3dist_kernels.formed_tiles import loop_to
from sa3dist_kernels.sums_plan import PROGRAM, Side
from sa3dist_kernels.triton_support import dot, one_of

PROGRAM_COUNT, SIDE_COUNT = tl.constexpr(len(PROGRAM)), tl.constexpr(len(Side._fields))
TOKENS, SIZE, STRIDE, MADE_STRIDE, SPAN, SHARE_COUNT, PARTS, MATRIX, GAINS, TOKEN_SPAN = map(
    tl.constexpr, range(len(Side._fields))
)


@triton.jit
def _program(programs):
    """Layer, side, block and part of this program."""
    place = programs + tl.program_id(0).to(tl.int64) * PROGRAM_COUNT
    return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)


@triton.jit
def _of(sizes, layer, side, NAME: tl.constexpr, MULTIPLE: tl.constexpr):
    """A size, a stride or a place of one side of a layer, a multiple of MULTIPLE."""
    return tl.multiple_of(tl.load(sizes + (layer * 2 + side) * SIDE_COUNT + NAME), MULTIPLE)


@triton.jit
def thin_products_kernel(
    xs, dys, rights, lefts, parts, sizes, programs,
    R: tl.constexpr, WIDE_X: tl.constexpr, WIDE_Y: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A share of T or of U (N, R), float32: one block of tokens, one span of channels."""
    layer, side, block, share = _program(programs)
    N, span = _of(sizes, layer, side, TOKENS, 1), _of(sizes, layer, side, SPAN, BLOCK_K).to(tl.int32)
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    n_mask, r_mask = n < N, r < R
    place = parts + _of(sizes, layer, side, PARTS, 16) + (share * N + n[:, None]) * R + r[None, :]
    inside = n_mask[:, None] & r_mask[None, :]
    if side == 0:
        I = _of(sizes, layer, side, SIZE, WIDE_X).to(tl.int32)
        acc = _product_share(
            one_of(xs, layer), one_of(rights, layer), share * span, span, n, r, n_mask, r_mask, I,
            _of(sizes, layer, side, STRIDE, WIDE_X), 1, I,
            LOOP, BLOCK_N, SPLITS, BLOCK_K, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(place, acc, mask=inside)
    else:
        O = _of(sizes, layer, side, SIZE, WIDE_Y).to(tl.int32)
        acc = _product_share(
            one_of(dys, layer), one_of(lefts, layer), share * span, span, n, r, n_mask, r_mask, O,
            _of(sizes, layer, side, STRIDE, WIDE_Y), R, 1,
            LOOP, BLOCK_N, SPLITS, BLOCK_K, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(place, acc, mask=inside)


@triton.jit
def _product_share(
    tokens, factor, first, span, n, r, n_mask, r_mask, size, tokens_n, factor_k, factor_r,
    LOOP: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The product of a block of tokens with a thin factor, summed over one span of their ``size`` channels.

    SPLITS   warps that take neighbouring channels each, and add up at the end
    """
    end = tl.minimum(size, first + span)
    if SPLITS == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in tl.range(0, loop_to(span, LOOP), BLOCK_K, num_stages=STAGES):
            k = first + start + tl.arange(0, BLOCK_K)
            k_mask = k < end
            inside = n_mask[:, None] & k_mask[None, :]
            tile = tl.load(tokens + n[:, None] * tokens_n + k[None, :], mask=inside, other=0.0)
            place = factor + (k[:, None] * factor_k + r[None, :] * factor_r)
            thin = tl.load(place, mask=r_mask[None, :] & k_mask[:, None], other=0.0)
            acc = dot(tile, thin, acc, PRECISION, UPCAST)
        return acc
    else:
        places = tl.arange(0, SPLITS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        parts = tl.zeros((SPLITS, BLOCK_N, BLOCK_R), tl.float32)
        for start in tl.range(0, loop_to(span, LOOP), SPLITS * BLOCK_K, num_stages=STAGES):
            k = first + start + places
            k_mask = k < end
            inside = n_mask[None, :, None] & k_mask[:, None, :]
            tile = tl.load(tokens + n[None, :, None] * tokens_n + k[:, None, :], mask=inside, other=0.0)
            place = factor + (k[:, :, None] * factor_k + r[None, None, :] * factor_r)
            thin = tl.load(place, mask=r_mask[None, None, :] & k_mask[:, :, None], other=0.0)
            parts = dot(tile, thin, parts, PRECISION, UPCAST)
        return tl.sum(parts, axis=0)


@triton.jit
def _summed(parts, n, r, N, shares, mask, R: tl.constexpr, SHARES: tl.constexpr):
    """T or U at (n, r), from its shares, SHARES at most."""
    place = n[:, None] * R + r[None, :]
    total = tl.load(parts + place, mask=mask, other=0.0)
    for share in tl.static_range(1, SHARES):
        total += tl.load(parts + share * N * R + place, mask=mask & (share < shares), other=0.0)
    return total


@triton.jit
def raw_sums_kernel(
    xs, dxs, dys, zs, parts, out, sizes, programs, total,
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, XS: tl.constexpr, SHARES: tl.constexpr,
    WIDE_X: tl.constexpr, WIDE_Y: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of outputs (P1, s_g) or of inputs (P2, s_h) over one span of tokens, into ``out`` (S, total)."""
    layer, side, block, split = _program(programs)
    rank = tl.program_id(1)
    r = rank * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < R
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    N = _of(sizes, layer, side, TOKENS, 1)
    span = _of(sizes, layer, side, TOKEN_SPAN, BLOCK_N).to(tl.int32)
    mine = out + split.to(tl.int64) * total
    matrix, gains = mine + _of(sizes, layer, side, MATRIX, 1), mine + _of(sizes, layer, side, GAINS, 1)
    # What the other side was multiplied to.
    thin, shares = parts + _of(sizes, layer, 1 - side, PARTS, 16), _of(sizes, layer, 1 - side, SHARE_COUNT, 1)
    if side == 1:
        O = _of(sizes, layer, side, SIZE, WIDE_Y).to(tl.int32)
        m_mask = m < O
        acc, gain = _block_sums(
            one_of(dys, layer), one_of(zs, layer), thin, m, m_mask, r, r_mask, split, span, N, shares,
            _of(sizes, layer, side, STRIDE, WIDE_Y), _of(sizes, layer, side, MADE_STRIDE, WIDE_Y),
            R, ROWS, XS, SHARES, LOOP, BLOCK_N, BLOCK_M, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        if not XS:
            tl.store(matrix + m[:, None] * R + r[None, :], acc, mask=m_mask[:, None] & r_mask[None, :])
        if ROWS and rank == 0:
            tl.store(gains + m, gain, mask=m_mask)
    else:
        I = _of(sizes, layer, side, SIZE, WIDE_X).to(tl.int32)
        m_mask = m < I
        acc, gain = _block_sums(
            one_of(xs, layer), one_of(dxs, layer), thin, m, m_mask, r, r_mask, split, span, N, shares,
            _of(sizes, layer, side, STRIDE, WIDE_X), _of(sizes, layer, side, MADE_STRIDE, WIDE_X),
            R, COLS, XS, SHARES, LOOP, BLOCK_N, BLOCK_M, BLOCK_R, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        if not XS:
            tl.store(matrix + r[None, :] * I + m[:, None], acc, mask=m_mask[:, None] & r_mask[None, :])
        if COLS and rank == 0:
            tl.store(gains + m, gain, mask=m_mask)


@triton.jit
def _block_sums(
    values, made, parts, m, m_mask, r, r_mask, split, span, N, shares, values_n, made_n,
    R: tl.constexpr, GAIN: tl.constexpr, XS: tl.constexpr, SHARES: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Over one span of tokens, of the channels ``m``: values^T T (or U), and the sums of values .* made if GAIN."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    gain = tl.zeros((BLOCK_M,), tl.float32)
    end = tl.minimum(N, (split + 1) * span)
    for start in tl.range(0, loop_to(span, LOOP), BLOCK_N, num_stages=STAGES):
        n = (split * span + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < end)[:, None] & m_mask[None, :]
        tile = tl.load(values + n[:, None] * values_n + m[None, :], mask=inside, other=0.0)
        if GAIN:
            other = tl.load(made + n[:, None] * made_n + m[None, :], mask=inside, other=0.0)
            gain += tl.sum(tile.to(tl.float32) * other.to(tl.float32), axis=0)
        if not XS:
            mask = (n < end)[:, None] & r_mask[None, :]
            thin = _summed(parts, n, r, N, shares, mask, R, SHARES).to(tile.dtype)
            acc = dot(tl.trans(tile), thin, acc, PRECISION, UPCAST)
    return acc, gain


@triton.jit
def core_sums_kernel(
    parts, out, sizes, programs, total,
    R: tl.constexpr, SHARES: tl.constexpr, LOOP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """PM over one span of tokens, float32: one block of its rows and one of its columns, into ``out`` (S, total)."""
    layer, down, across, split = _program(programs)
    i, j = down * BLOCK_R + tl.arange(0, BLOCK_R), across * BLOCK_R + tl.arange(0, BLOCK_R)
    N, span = _of(sizes, layer, 0, TOKENS, 1), _of(sizes, layer, 0, TOKEN_SPAN, BLOCK_N).to(tl.int32)
    ups, downs = parts + _of(sizes, layer, 1, PARTS, 16), parts + _of(sizes, layer, 0, PARTS, 16)
    up_shares, down_shares = _of(sizes, layer, 1, SHARE_COUNT, 1), _of(sizes, layer, 0, SHARE_COUNT, 1)
    end = tl.minimum(N, (split + 1) * span)
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for start in range(0, loop_to(span, LOOP), BLOCK_N):
        n = (split * span + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        up = _summed(ups, n, i, N, up_shares, (n < end)[:, None] & (i < R)[None, :], R, SHARES)
        some = _summed(downs, n, j, N, down_shares, (n < end)[:, None] & (j < R)[None, :], R, SHARES)
        acc = tl.dot(tl.trans(up), some, acc, input_precision="ieee")
    place = out + split.to(tl.int64) * total + _of(sizes, layer, 0, MATRIX, 1) + i[:, None] * R + j[None, :]
    tl.store(place, acc, mask=(i < R)[:, None] & (j < R)[None, :])
