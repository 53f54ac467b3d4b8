"""FORM of dora and dora-rows where whole rows fit in registers: V stays there until the norms are known.

``form_rows_kernel`` reads W0 twice, on an H100 both times from memory: the rows in flight on all multiprocessors exceed
the L2 cache. Here W0 is read once.

R' of these types is R rounded to the product dtype. A small launch writes it first, and both products with R read it.
R in float32 would be read from the L2 cache twice per block of rows, four times the bytes of W0; that took as long as
reading W0 twice. L is split into two bfloat16 terms, which keep 16 of float32's 24 significant bits.

Tiles of V do not pass through shared memory. A column of W0 may be any column of the matrix instruction as long as R
has the same order: column 8 t + 4 e + j of 32 is the instruction's column 8 j + 2 t + e. The 8 neighbours in W0 that a
thread loads at once are then those the instruction expects in its registers. W' is stored and R loaded in the same
order, so Triton's layout conversions only rename registers.

In a load, the last dimension is a thread's vector, the first ones are a warp's lanes, and the next are warps. A thread
holds two neighbours of a bfloat16 operand along the sum: ranks 8 q + 2 t + p of R, and the instruction's columns
8 j + 2 t + e of V and R^T.

Legend: O fan_out, I fan_in, R rank.
"""

import triton
import triton.language as tl

from sa3dist_kernels.formed_tiles import (
    EPS,
    FAN_IN,
    FAN_OUT,
    FORMED,
    LEFT,
    LEFT_OUT,
    RESIDENT_WIDTH,
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

WIDTH = tl.constexpr(RESIDENT_WIDTH)


@triton.jit
def form_right_kernel(
    floats, product, layers, programs,
    R: tl.constexpr, ALIGN_I: tl.constexpr, ALIGN_T: tl.constexpr, BLOCK_I: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """R' of a block of columns that are not scaled."""
    layer, block, _ = program(programs)
    I = field(layers, layer, FAN_IN, ALIGN_I)
    cols = block * BLOCK_I + tl.arange(0, BLOCK_I)
    cols_ok = cols < I
    rank = tl.arange(0, RANK_STEP)
    part = right_tile(floats + field(layers, layer, RIGHT, ALIGN_T), cols, cols_ok, 0, I, R, RANK_STEP)
    pointers = product + field(layers, layer, RIGHT_OUT, 16) + rank[:, None].to(tl.int64) * I + cols[None, :]
    tl.store(pointers, part.to(product.dtype.element_ty), mask=(rank < R)[:, None] & cols_ok[None, :])


@triton.jit
def form_resident_kernel(
    floats, weight, product, scales, layers, programs,
    R: tl.constexpr, I: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_T: tl.constexpr,
    BLOCK_O: tl.constexpr, SPLITS: tl.constexpr, RANK_STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """n, g, V R^T, W' and L' of a block of rows. I is a multiple of SPLITS * WIDTH, R at most RANK_STEP."""
    layer, block, _ = program(programs)
    begin = block * BLOCK_O
    end = tl.minimum(field(layers, layer, FAN_OUT, 1).to(tl.int32), begin + BLOCK_O)
    # Loaded as pairs: Triton would keep each bfloat16 in a register of its own.
    pairs = (weight + field(layers, layer, WEIGHT, ALIGN_W)).to(tl.pointer_type(tl.int32))
    tiles = _weight_block(pairs, begin, end, I, BLOCK_O, SPLITS)
    rows = begin + tl.arange(0, BLOCK_O)
    left = floats + field(layers, layer, LEFT, ALIGN_T)
    magnitude = tl.load(floats + field(layers, layer, ROW_MAGNITUDE, 1) + rows, mask=rows < end, other=0.0)
    left_block = left_tile(left, rows, rows < end, 0, R, RANK_STEP)
    scaled = split_left(tl.load(scales + layer) * left_block, SPLITS, BLOCK_O, RANK_STEP)
    high = scaled.to(tl.bfloat16)
    low = (scaled - high.to(tl.float32)).to(tl.bfloat16)
    right = product + field(layers, layer, RIGHT_OUT, 16)
    squares = tl.zeros((SPLITS, BLOCK_O, 8), tl.float32)
    v_parts = ()
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        v = _instruction_order(_unpacked(tiles[part], SPLITS, BLOCK_O), SPLITS, BLOCK_O)
        right_part = _right_part(right, part, I, R, RANK_STEP, SPLITS)
        v = dot(high, right_part, dot(low, right_part, v, "ieee", UPCAST), "ieee", UPCAST)
        squares += tl.sum(tl.reshape(v * v, (SPLITS, BLOCK_O, WIDTH // 8, 8)), axis=2)
        v_parts = v_parts + (v,)
    norm = tl.sqrt(tl.sum(tl.sum(squares, axis=2), axis=0))
    gain = magnitude / (norm + EPS)
    norms, gains = floats + field(layers, layer, ROW_NORM, 16), floats + field(layers, layer, ROW_GAIN, 16)
    tl.store(norms + rows, norm, mask=rows < end)
    tl.store(gains + rows, gain, mask=rows < end)
    rank = tl.arange(0, RANK_STEP)
    offsets, inside = rows.to(tl.int64)[:, None] * R + rank[None, :], (rows < end)[:, None] & (rank < R)[None, :]
    scaled_left = left_block * gain[:, None]
    left_out = product + field(layers, layer, LEFT_OUT, 16)
    tl.store(left_out + offsets, scaled_left.to(product.dtype.element_ty), mask=inside)
    gain_floored = floored(gain)
    formed = product + field(layers, layer, FORMED, 16)
    pointers = formed + begin.to(tl.int64) * I + (_rows(BLOCK_O) * I + _cols(WIDTH, SPLITS))
    pointers_ok = _rows(BLOCK_O) < end - begin
    cross = tl.zeros((SPLITS, BLOCK_O, RANK_STEP), tl.float32)
    # V R^T in this loop, not above: registers are scarce until the first parts of V are stored.
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        v = v_parts[part]
        right_part = _right_part_transposed(right, part, I, R, RANK_STEP, SPLITS)
        cross = dot(v.to(tl.bfloat16), right_part, cross, "ieee", UPCAST)
        weight_part = _memory_order((v * gain_floored[None, :, None]).to(formed.dtype.element_ty), SPLITS, BLOCK_O)
        tl.store(pointers + part * SPLITS * WIDTH, weight_part, mask=pointers_ok, eviction_policy="evict_first")
    row_cross = floats + field(layers, layer, ROW_CROSS, 16)
    tl.store(row_cross + offsets, tl.sum(cross, axis=0), mask=inside)


@triton.jit
def _rows(BLOCK_O: tl.constexpr):
    """Row offsets in a block, in the order of loads and stores (8, 1, BLOCK_O / 8, 1)."""
    rows = 8 * tl.arange(0, BLOCK_O // 8)[None, :] + tl.arange(0, 8)[:, None]
    return rows[:, None, :, None]


@triton.jit
def _cols(COUNT: tl.constexpr, SPLITS: tl.constexpr):
    """Column offsets in a part, in the order of loads and stores (1, SPLITS, 1, COUNT): COUNT per split."""
    cols = tl.arange(0, SPLITS)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    return cols[None, :, None, :]


@triton.jit
def _weight_block(pairs, begin, end, I: tl.constexpr, BLOCK_O: tl.constexpr, SPLITS: tl.constexpr):
    """All parts of a block of rows of W0, as pairs. Rows from ``end`` on repeat row ``end - 1``."""
    rows = tl.minimum(_rows(BLOCK_O), end - 1 - begin)
    pointers = pairs + begin.to(tl.int64) * (I // 2) + (rows * (I // 2) + _cols(WIDTH // 2, SPLITS))
    tiles = ()
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        # Bypass the L1 cache: it holds R.
        tiles = tiles + (tl.load(pointers + part * SPLITS * (WIDTH // 2), cache_modifier=".cg"),)
    return tiles


@triton.jit
def _unpacked(pairs, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """Float32 (8, SPLITS, BLOCK_O / 8, WIDTH) from pairs of bfloat16: their bits, then zeros."""
    even, odd = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(even, odd), (8, SPLITS, BLOCK_O // 8, WIDTH))


@triton.jit
def _right_part(right, part, I: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, SPLITS: tl.constexpr):
    """R (SPLITS, RANK_STEP, WIDTH) of one part of the columns, in the instruction's order."""
    # (t, g, split, q, p, j): rank 8 q + 2 t + p, column 4 g + j
    rank = 2 * tl.arange(0, 4)[:, None, None, None, None, None] + tl.arange(0, 2)[None, None, None, None, :, None]
    rank += 8 * tl.arange(0, RANK_STEP // 8)[None, None, None, :, None, None]
    cols = tl.arange(0, SPLITS)[None, None, :, None, None, None] * WIDTH
    cols += 4 * tl.arange(0, 8)[None, :, None, None, None, None] + tl.arange(0, 4)[None, None, None, None, None, :]
    pointers = right + (rank * I + cols) + part * SPLITS * WIDTH
    tile = tl.load(pointers, mask=rank < R, other=0.0, eviction_policy="evict_last")
    return tl.reshape(tl.permute(tile, (2, 3, 0, 4, 5, 1)), (SPLITS, RANK_STEP, WIDTH))


@triton.jit
def _right_part_transposed(
    right, part, I: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, SPLITS: tl.constexpr
):
    """R^T (SPLITS, WIDTH, RANK_STEP) of one part of the columns, in the instruction's order."""
    # (t, g, split, h, 4 e + j): rank 8 h + g, column 8 t + 4 e + j
    rank = tl.arange(0, 8)[None, :, None, None, None] + 8 * tl.arange(0, RANK_STEP // 8)[None, None, None, :, None]
    cols = tl.arange(0, SPLITS)[None, None, :, None, None] * WIDTH
    cols += 8 * tl.arange(0, 4)[:, None, None, None, None] + tl.arange(0, 8)[None, None, None, None, :]
    pointers = right + (rank * I + cols) + part * SPLITS * WIDTH
    tile = tl.load(pointers, mask=rank < R, other=0.0, eviction_policy="evict_last")
    tile = tl.reshape(tile, (4, 8, SPLITS, RANK_STEP // 8, 2, 4))
    return tl.reshape(tl.permute(tile, (2, 5, 0, 4, 3, 1)), (SPLITS, WIDTH, RANK_STEP))


@triton.jit
def _instruction_order(tile, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """From the loads' order (8, SPLITS, BLOCK_O / 8, WIDTH) to (SPLITS, BLOCK_O, WIDTH)."""
    # (g, split, h, t, e, j) to (split, h, g, j, t, e)
    tile = tl.permute(tl.reshape(tile, (8, SPLITS, BLOCK_O // 8, 4, 2, 4)), (1, 2, 0, 5, 3, 4))
    return tl.reshape(tile, (SPLITS, BLOCK_O, WIDTH))


@triton.jit
def _memory_order(tile, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """The inverse of ``_instruction_order``."""
    tile = tl.permute(tl.reshape(tile, (SPLITS, BLOCK_O // 8, 8, 4, 4, 2)), (2, 0, 1, 4, 5, 3))
    return tl.reshape(tile, (8, SPLITS, BLOCK_O // 8, WIDTH))
