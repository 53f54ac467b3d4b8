"""FORM of layers with a row magnitude alone, likewise in registers (``form_kept.py``), with R in bfloat16.

R' of these types is R, rounded to the format of the products: a small launch writes it ahead, and both products with R
read it there. It is 48 KiB for 1536 columns, which the first-level cache keeps for all programs of a multiprocessor;
as float32 it would come from the second-level cache twice for each block of rows, four times as many bytes as W0 has.

AHEAD: a program has a span of neighbouring blocks of rows, and asks for the next one before it computes the present
one. So a load is always under way; else that is left to several programs on a multiprocessor.

The order of columns is that of ``form_kept.py``. Of a bfloat16 operand a thread holds two neighbours along the sum:
ranks 8 q + 2 t + p of R, instruction's columns 8 j + 2 t + e of V and R^T.

Legend: O fan_out, I fan_in, R rank.
"""

import triton
import triton.language as tl

from sa3dist_kernels.form_kept import WIDTH, instruction_order, memory_order
from sa3dist_kernels.formed_tiles import (
    EPS,
    FAN_IN,
    FAN_OUT,
    FORMED,
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
    loop_to,
    program,
    right_tile,
    split_left,
)
from sa3dist_kernels.triton_support import dot


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
def form_spans_kernel(
    floats, weight, product, scales, layers, programs,
    R: tl.constexpr, I: tl.constexpr, LOOP_BLOCKS: tl.constexpr, WIDE_W: tl.constexpr, WIDE_T: tl.constexpr,
    BLOCK_O: tl.constexpr, SPLITS: tl.constexpr, RANK_STEP: tl.constexpr,
    AHEAD: tl.constexpr, LATE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """n, g, V R^T, W' and L' of a span of blocks of rows. I is a multiple of SPLITS * WIDTH, R at most RANK_STEP.

    AHEAD  a block is loaded while the one before it is computed; else a span has one
    LATE   it is asked for behind all reads of R, which need not wait then should the first-level cache answer in order
    """
    layer, first, count = program(programs)
    end = tl.minimum(field(layers, layer, FAN_OUT, 1).to(tl.int32), (first + count) * BLOCK_O)
    # Two numbers in one: Triton would keep each bfloat16 in a register of its own.
    pairs = (weight + field(layers, layer, WEIGHT, WIDE_W)).to(tl.pointer_type(tl.int32))
    right, scale = product + field(layers, layer, RIGHT_OUT, 16), tl.load(scales + layer)
    next_tiles = _weight_block(pairs, first * BLOCK_O, end, I, BLOCK_O, SPLITS)
    next_thin = _thin_block(floats, layers, layer, first * BLOCK_O, end, R, WIDE_T, BLOCK_O, RANK_STEP)
    places = ()
    if LATE:
        # Registers are scarce in the others, which find a place when it is needed.
        places = _places(floats, product, layers, layer)
    if AHEAD:
        for step in range(loop_to(count, LOOP_BLOCKS)):
            begin = (first + step) * BLOCK_O
            tiles, thin = next_tiles, next_thin
            if not LATE:
                next_tiles = _weight_block(pairs, begin + BLOCK_O, end, I, BLOCK_O, SPLITS)
                next_thin = _thin_block(floats, layers, layer, begin + BLOCK_O, end, R, WIDE_T, BLOCK_O, RANK_STEP)
            kept, squares, cross = _products(tiles, thin, right, scale, R, I, BLOCK_O, SPLITS, RANK_STEP, LATE, UPCAST)
            if LATE:
                next_tiles = _weight_block(pairs, begin + BLOCK_O, end, I, BLOCK_O, SPLITS)
                next_thin = _thin_block(floats, layers, layer, begin + BLOCK_O, end, R, WIDE_T, BLOCK_O, RANK_STEP)
            _write_block(
                floats, product, layers, layer, places, kept, squares, cross, thin, right, begin, end, R, I, BLOCK_O,
                SPLITS, RANK_STEP, LATE, UPCAST,
            )  # fmt: skip
    else:
        kept, squares, cross = _products(
            next_tiles, next_thin, right, scale, R, I, BLOCK_O, SPLITS, RANK_STEP, LATE, UPCAST
        )
        _write_block(
            floats, product, layers, layer, places, kept, squares, cross, next_thin, right, first * BLOCK_O, end, R, I,
            BLOCK_O, SPLITS, RANK_STEP, LATE, UPCAST,
        )  # fmt: skip


@triton.jit
def _places(floats, product, layers, layer):
    """Where a layer's n, g, V R^T, L' and W' begin."""
    norms, gains = floats + field(layers, layer, ROW_NORM, 16), floats + field(layers, layer, ROW_GAIN, 16)
    crosses, left_out = floats + field(layers, layer, ROW_CROSS, 16), product + field(layers, layer, LEFT_OUT, 16)
    return norms, gains, crosses, left_out, product + field(layers, layer, FORMED, 16)


@triton.jit
def _place(places, AT: tl.constexpr, base, layers, layer, NAME: tl.constexpr, KNOWN: tl.constexpr):
    """One of them; KNOWN: from ``places``."""
    if KNOWN:
        return places[AT]
    else:
        return base + field(layers, layer, NAME, 16)


@triton.jit
def _products(
    tiles, thin, right, scale,
    R: tl.constexpr, I: tl.constexpr, BLOCK_O: tl.constexpr, SPLITS: tl.constexpr, RANK_STEP: tl.constexpr,
    CROSS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """V, part by part; sums of its squares (SPLITS, BLOCK_O, 8); with CROSS V R^T (SPLITS, BLOCK_O, RANK_STEP)."""
    left, _ = thin
    # Two bfloat16 have 16 of a float32's 24 digits.
    scaled = split_left(scale * left, SPLITS, BLOCK_O, RANK_STEP)
    high = scaled.to(tl.bfloat16)
    low = (scaled - high.to(tl.float32)).to(tl.bfloat16)
    squares = tl.zeros((SPLITS, BLOCK_O, 8), tl.float32)
    cross = tl.zeros((SPLITS, BLOCK_O, RANK_STEP), tl.float32)
    kept = ()
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        v = instruction_order(_both(tiles[part], SPLITS, BLOCK_O), SPLITS, BLOCK_O)
        other = _straight_right(right, part, I, R, RANK_STEP, SPLITS)
        v = dot(high, other, dot(low, other, v, "ieee", UPCAST), "ieee", UPCAST)
        squares += tl.sum(tl.reshape(v * v, (SPLITS, BLOCK_O, WIDTH // 8, 8)), axis=2)
        if CROSS:
            turned = _turned_right(right, part, I, R, RANK_STEP, SPLITS)
            cross = dot(v.to(tl.bfloat16), turned, cross, "ieee", UPCAST)
        kept = kept + (v,)
    return kept, squares, cross


@triton.jit
def _write_block(
    floats, product, layers, layer, places, kept, squares, cross, thin, right, begin, end,
    R: tl.constexpr, I: tl.constexpr, BLOCK_O: tl.constexpr, SPLITS: tl.constexpr, RANK_STEP: tl.constexpr,
    LATE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """n, g, V R^T, L' and W' of a block of rows. LATE: V R^T and ``places`` are there."""
    left, magnitude = thin
    rows = begin + tl.arange(0, BLOCK_O)
    norm = tl.sqrt(tl.sum(tl.sum(squares, axis=2), axis=0))
    gain = magnitude / (norm + EPS)
    tl.store(_place(places, 0, floats, layers, layer, ROW_NORM, LATE) + rows, norm, mask=rows < end)
    tl.store(_place(places, 1, floats, layers, layer, ROW_GAIN, LATE) + rows, gain, mask=rows < end)
    rank = tl.arange(0, RANK_STEP)
    at, inside = rows.to(tl.int64)[:, None] * R + rank[None, :], (rows < end)[:, None] & (rank < R)[None, :]
    left_out = _place(places, 3, product, layers, layer, LEFT_OUT, LATE)
    tl.store(left_out + at, (left * gain[:, None]).to(left_out.dtype.element_ty), mask=inside)
    factor = floored(gain)
    formed = _place(places, 4, product, layers, layer, FORMED, LATE)
    place = formed + begin.to(tl.int64) * I + (_rows(BLOCK_O) * I + _cols(WIDTH, SPLITS))
    place_ok = _rows(BLOCK_O) < end - begin
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        v = kept[part]
        # V R^T here where registers are scarce until the first parts of V are stored.
        if not LATE:
            turned = _turned_right(right, part, I, R, RANK_STEP, SPLITS)
            cross = dot(v.to(tl.bfloat16), turned, cross, "ieee", UPCAST)
        made = memory_order((v * factor[None, :, None]).to(formed.dtype.element_ty), SPLITS, BLOCK_O)
        tl.store(place + part * SPLITS * WIDTH, made, mask=place_ok, eviction_policy="evict_first")
    tl.store(_place(places, 2, floats, layers, layer, ROW_CROSS, LATE) + at, tl.sum(cross, axis=0), mask=inside)


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
def _thin_block(
    floats, layers, layer, begin, end,
    R: tl.constexpr, WIDE_T: tl.constexpr, BLOCK_O: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """L (BLOCK_O, RANK_STEP) and magnitudes (BLOCK_O,) of a block of rows, likewise."""
    rows = tl.minimum(begin + tl.arange(0, BLOCK_O), end - 1)
    left = left_tile(floats + field(layers, layer, LEFT, WIDE_T), rows, rows < end, 0, R, RANK_STEP)
    return left, tl.load(floats + field(layers, layer, ROW_MAGNITUDE, 1) + rows)


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
