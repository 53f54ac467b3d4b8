"""FORM of dora and dora-rows where their rows fit in registers: they stay there until their norms are known.

``form_rows_kernel`` reads W0 twice, and an H100 both times from memory: the programs of all its multiprocessors have
more rows under way than its second-level cache keeps. Here W0 is read once.

R' of these types is R, rounded to the format of the products: a small launch writes it ahead, and both products with R
read it there. As float32 R would come from the second-level cache twice for each block of rows, four times as many
bytes as W0 has: that took as long as reading W0 twice. L is split into two bfloat16, 16 of a float32's 24 digits.

Nor does a tile of V pass through shared memory. Which column of W0 is which column of the matrix instruction is free
if R has the same order: column 8 t + 4 e + j of 32 is the instruction's column 8 j + 2 t + e. So a thread's 8
neighbours in W0, which it loads at once, are those the instruction wants in its registers; W' leaves it likewise, and
R comes likewise. Where it converts layouts, Triton has only registers to rename. The order of a load's dimensions
gives that of its threads: the last one is the vector, the first ones are a warp's lanes, then come warps. Of a bfloat16
operand a thread holds two neighbours along the sum: ranks 8 q + 2 t + p of R, instruction's columns 8 j + 2 t + e of V
and R^T.

Legend: O fan_out, I fan_in, R rank.
"""

import triton
import triton.language as tl

from sa3dist_kernels.formed_tiles import (
    EPS,
    FAN_IN,
    FAN_OUT,
    FORMED,
    KEPT_WIDTH,
    LEFT,
    LEFT_OUT,
    RIGHT,
    RIGHT_OUT,
    ROW_CROSS,
    ROW_GAIN,
    ROW_MAGNITUDE,
    ROW_NORM,
    WEIGHT,
    field,
    floored,
    left_tile,
    program,
    right_tile,
    split_left,
)
from sa3dist_kernels.triton_support import dot

WIDTH = tl.constexpr(KEPT_WIDTH)


@triton.jit
def form_right_kernel(
    floats, product, layers, programs,
    R: tl.constexpr, WIDE_I: tl.constexpr, WIDE_T: tl.constexpr, BLOCK_I: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """R' of a block of columns that are not scaled."""
    layer, block, _ = program(programs)
    I = field(layers, layer, FAN_IN, WIDE_I)
    cols = block * BLOCK_I + tl.arange(0, BLOCK_I)
    cols_ok = cols < I
    rank = tl.arange(0, RANK_STEP)
    part = right_tile(floats + field(layers, layer, RIGHT, WIDE_T), cols, cols_ok, 0, I, R, RANK_STEP)
    place = product + field(layers, layer, RIGHT_OUT, 16) + rank[:, None].to(tl.int64) * I + cols[None, :]
    tl.store(place, part.to(product.dtype.element_ty), mask=(rank < R)[:, None] & cols_ok[None, :])


@triton.jit
def form_kept_kernel(
    floats, weight, product, scales, layers, programs,
    R: tl.constexpr, I: tl.constexpr, WIDE_W: tl.constexpr, WIDE_T: tl.constexpr,
    BLOCK_O: tl.constexpr, SPLITS: tl.constexpr, RANK_STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """n, g, V R^T, W' and L' of a block of rows. I is a multiple of SPLITS * WIDTH, R at most RANK_STEP."""
    layer, block, _ = program(programs)
    begin = block * BLOCK_O
    end = tl.minimum(field(layers, layer, FAN_OUT, 1).to(tl.int32), begin + BLOCK_O)
    # Two numbers in one: Triton would keep each bfloat16 in a register of its own.
    pairs = (weight + field(layers, layer, WEIGHT, WIDE_W)).to(tl.pointer_type(tl.int32))
    tiles = _weight_block(pairs, begin, end, I, BLOCK_O, SPLITS)
    rows = begin + tl.arange(0, BLOCK_O)
    left = floats + field(layers, layer, LEFT, WIDE_T)
    magnitude = tl.load(floats + field(layers, layer, ROW_MAGNITUDE, 1) + rows, mask=rows < end, other=0.0)
    some_left = left_tile(left, rows, rows < end, 0, R, RANK_STEP)
    scaled = split_left(tl.load(scales + layer) * some_left, SPLITS, BLOCK_O, RANK_STEP)
    high = scaled.to(tl.bfloat16)
    low = (scaled - high.to(tl.float32)).to(tl.bfloat16)
    right = product + field(layers, layer, RIGHT_OUT, 16)
    squares = tl.zeros((SPLITS, BLOCK_O, 8), tl.float32)
    kept = ()
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        v = _instruction_order(_both(tiles[part], SPLITS, BLOCK_O), SPLITS, BLOCK_O)
        other = _straight_right(right, part, I, R, RANK_STEP, SPLITS)
        v = dot(high, other, dot(low, other, v, "ieee", UPCAST), "ieee", UPCAST)
        squares += tl.sum(tl.reshape(v * v, (SPLITS, BLOCK_O, WIDTH // 8, 8)), axis=2)
        kept = kept + (v,)
    norm = tl.sqrt(tl.sum(tl.sum(squares, axis=2), axis=0))
    gain = magnitude / (norm + EPS)
    norms, gains = floats + field(layers, layer, ROW_NORM, 16), floats + field(layers, layer, ROW_GAIN, 16)
    tl.store(norms + rows, norm, mask=rows < end)
    tl.store(gains + rows, gain, mask=rows < end)
    rank = tl.arange(0, RANK_STEP)
    thin, thin_ok = rows.to(tl.int64)[:, None] * R + rank[None, :], (rows < end)[:, None] & (rank < R)[None, :]
    made = some_left * gain[:, None]
    tl.store(product + field(layers, layer, LEFT_OUT, 16) + thin, made.to(product.dtype.element_ty), mask=thin_ok)
    factor = floored(gain)
    formed = product + field(layers, layer, FORMED, 16)
    place = formed + begin.to(tl.int64) * I + (_rows(BLOCK_O) * I + _cols(WIDTH, SPLITS))
    place_ok = _rows(BLOCK_O) < end - begin
    cross = tl.zeros((SPLITS, BLOCK_O, RANK_STEP), tl.float32)
    # V R^T here, not above: registers are scarce until the first parts of V are stored.
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        v = kept[part]
        other = _turned_right(right, part, I, R, RANK_STEP, SPLITS)
        cross = dot(v.to(tl.bfloat16), other, cross, "ieee", UPCAST)
        made = _memory_order((v * factor[None, :, None]).to(formed.dtype.element_ty), SPLITS, BLOCK_O)
        tl.store(place + part * SPLITS * WIDTH, made, mask=place_ok, eviction_policy="evict_first")
    crosses = floats + field(layers, layer, ROW_CROSS, 16)
    tl.store(crosses + thin, tl.sum(cross, axis=0), mask=thin_ok)


@triton.jit
def _rows(BLOCK_O: tl.constexpr):
    """Of a block, in the order of loads and stores (8, 1, BLOCK_O / 8, 1)."""
    rows = 8 * tl.arange(0, BLOCK_O // 8)[None, :] + tl.arange(0, 8)[:, None]
    return rows[:, None, :, None]


@triton.jit
def _cols(WIDE: tl.constexpr, SPLITS: tl.constexpr):
    """Of a part, likewise (1, SPLITS, 1, WIDE); WIDE elements to each split."""
    cols = tl.arange(0, SPLITS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    return cols[None, :, None, :]


@triton.jit
def _weight_block(pairs, begin, end, I: tl.constexpr, BLOCK_O: tl.constexpr, SPLITS: tl.constexpr):
    """All parts of a block of rows of W0, in pairs; row ``end - 1`` instead of what would follow it."""
    rows = tl.minimum(_rows(BLOCK_O), end - 1 - begin)
    place = pairs + begin.to(tl.int64) * (I // 2) + (rows * (I // 2) + _cols(WIDTH // 2, SPLITS))
    tiles = ()
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        # Not in the first-level cache, which is for R.
        tiles = tiles + (tl.load(place + part * SPLITS * (WIDTH // 2), cache_modifier=".cg"),)
    return tiles


@triton.jit
def _both(pairs, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """Float32 (8, SPLITS, BLOCK_O / 8, WIDTH) of pairs of bfloat16: those bits, and zeros."""
    even, odd = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(even, odd), (8, SPLITS, BLOCK_O // 8, WIDTH))


@triton.jit
def _straight_right(right, part, I: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, SPLITS: tl.constexpr):
    """R (SPLITS, RANK_STEP, WIDTH) of one part of the columns, in the instruction's order."""
    # (t, g, split, q, p, j): rank 8 q + 2 t + p, column 4 g + j
    rank = 2 * tl.arange(0, 4)[:, None, None, None, None, None] + tl.arange(0, 2)[None, None, None, None, :, None]
    rank += 8 * tl.arange(0, RANK_STEP // 8)[None, None, None, :, None, None]
    cols = tl.arange(0, SPLITS)[None, None, :, None, None, None] * WIDTH
    cols += 4 * tl.arange(0, 8)[None, :, None, None, None, None] + tl.arange(0, 4)[None, None, None, None, None, :]
    place = right + (rank * I + cols) + part * SPLITS * WIDTH
    some = tl.load(place, mask=rank < R, other=0.0, eviction_policy="evict_last")
    return tl.reshape(tl.permute(some, (2, 3, 0, 4, 5, 1)), (SPLITS, RANK_STEP, WIDTH))


@triton.jit
def _turned_right(right, part, I: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, SPLITS: tl.constexpr):
    """R^T (SPLITS, WIDTH, RANK_STEP), likewise."""
    # (t, g, split, h, 4 e + j): rank 8 h + g, column 8 t + 4 e + j
    rank = tl.arange(0, 8)[None, :, None, None, None] + 8 * tl.arange(0, RANK_STEP // 8)[None, None, None, :, None]
    cols = tl.arange(0, SPLITS)[None, None, :, None, None] * WIDTH
    cols += 8 * tl.arange(0, 4)[:, None, None, None, None] + tl.arange(0, 8)[None, None, None, None, :]
    place = right + (rank * I + cols) + part * SPLITS * WIDTH
    some = tl.load(place, mask=rank < R, other=0.0, eviction_policy="evict_last")
    some = tl.reshape(some, (4, 8, SPLITS, RANK_STEP // 8, 2, 4))
    return tl.reshape(tl.permute(some, (2, 5, 0, 4, 3, 1)), (SPLITS, WIDTH, RANK_STEP))


@triton.jit
def _instruction_order(tile, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """(8, SPLITS, BLOCK_O / 8, WIDTH), as loaded, to (SPLITS, BLOCK_O, WIDTH)."""
    # (g, split, h, t, e, j) to (split, h, g, j, t, e)
    some = tl.permute(tl.reshape(tile, (8, SPLITS, BLOCK_O // 8, 4, 2, 4)), (1, 2, 0, 5, 3, 4))
    return tl.reshape(some, (SPLITS, BLOCK_O, WIDTH))


@triton.jit
def _memory_order(tile, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """The way back."""
    some = tl.permute(tl.reshape(tile, (SPLITS, BLOCK_O // 8, 8, 4, 4, 2)), (2, 0, 1, 4, 5, 3))
    return tl.reshape(some, (8, SPLITS, BLOCK_O // 8, WIDTH))
