"""FORM of layers with a row magnitude alone whose rows fit in registers: they stay there until their norms are known.

``form_rows_kernel`` reads W0 twice, and an H100 both times from memory: the programs of all its multiprocessors have
more rows under way than its second-level cache keeps. Here W0 is read once.

Nor does a tile of V pass through shared memory. Which column of W0 is which column of the matrix instruction is free
if R has the same order: column 8 t + 4 e + j of 32 is the instruction's column 8 j + 2 t + e. So a thread's 8
neighbours in W0, which it loads at once, are those the instruction wants in its registers; W' leaves it likewise, and
R comes likewise (4 neighbours). Where it converts layouts, Triton has only registers to rename. The order of a load's
dimensions gives that of its threads: the last one is the vector, the first ones are a warp's lanes, then come warps.

Legend: O fan_out, I fan_in, R rank.
"""

import triton
import triton.language as tl

from sa3dist_kernels.form import write_left, write_right
from sa3dist_kernels.formed_tiles import (
    BASIS,
    EPS,
    FAN_OUT,
    FORMED,
    KEPT_WIDTH,
    LEFT,
    RIGHT,
    ROW_CROSS,
    ROW_GAIN,
    ROW_MAGNITUDE,
    ROW_NORM,
    WEIGHT,
    field,
    floored,
    left_tile,
    norms_dot,
    program,
    split_left,
    vector,
)

WIDTH = tl.constexpr(KEPT_WIDTH)


@triton.jit
def form_kept_kernel(
    floats, weight, product, scales, layers, programs,
    R: tl.constexpr, I: tl.constexpr, XS: tl.constexpr, WIDE_W: tl.constexpr, WIDE_T: tl.constexpr,
    BLOCK_O: tl.constexpr, SPLITS: tl.constexpr, RANK_STEP: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """n, g, V R^T (V Q for -xs), W', L' and, but for -xs, R' of a block of rows. I is a multiple of SPLITS * WIDTH."""
    layer, block, _ = program(programs)
    O = field(layers, layer, FAN_OUT, 1).to(tl.int32)
    scale = tl.load(scales + layer)
    first = block * BLOCK_O
    rows = first + tl.arange(0, BLOCK_O)
    rows_ok = rows < O
    # Of a load or store: (8, BLOCK_O / 8).
    spread = first + 8 * tl.arange(0, BLOCK_O // 8)[None, :] + tl.arange(0, 8)[:, None]
    spread_ok = (spread < O)[:, None, :, None]
    cols = (tl.arange(0, SPLITS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])[None, :, None, :]
    weight_rows = weight + field(layers, layer, WEIGHT, WIDE_W) + (spread.to(tl.int64) * I)[:, None, :, None]
    left, right = floats + field(layers, layer, LEFT, WIDE_T), floats + field(layers, layer, RIGHT, WIDE_T)
    tiles = ()
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        # Not in the first-level cache, which is for R: the programs of a multiprocessor read that several times.
        place = weight_rows + (cols + part * SPLITS * WIDTH)
        tiles = tiles + (tl.load(place, mask=spread_ok, other=0.0, cache_modifier=".cg"),)
    if not XS:
        write_right(product, layers, layer, right, block, O, I, R, BLOCK_O, SPLITS * WIDTH, RANK_STEP)
    held = split_left(scale * left_tile(left, rows, rows_ok, 0, R, RANK_STEP), SPLITS, BLOCK_O, RANK_STEP)
    magnitude = vector(floats, layers, layer, ROW_MAGNITUDE, rows, O)
    squares = tl.zeros((SPLITS, BLOCK_O, 8), tl.float32)
    kept = ()
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        v = instruction_order(tiles[part], SPLITS, BLOCK_O).to(tl.float32)
        other = _right_part(right, part * SPLITS * WIDTH, I, R, RANK_STEP, SPLITS)
        v = tl.dot(held, other, v, input_precision=PRECISION)
        squares += tl.sum(tl.reshape(v * v, (SPLITS, BLOCK_O, WIDTH // 8, 8)), axis=2)
        kept = kept + (v,)
    norm = tl.sqrt(tl.sum(tl.sum(squares, axis=2), axis=0))
    gain = magnitude / (norm + EPS)
    tl.store(floats + field(layers, layer, ROW_NORM, 16) + rows, norm, mask=rows_ok)
    tl.store(floats + field(layers, layer, ROW_GAIN, 16) + rows, gain, mask=rows_ok)
    write_left(product, layers, layer, left, rows.to(tl.int64), rows_ok, gain, R, RANK_STEP)
    factor = floored(gain)
    formed_rows = product + field(layers, layer, FORMED, 16) + (spread.to(tl.int64) * I)[:, None, :, None]
    basis = floats + field(layers, layer, BASIS if XS else RIGHT, WIDE_T)
    cross = tl.zeros((SPLITS, BLOCK_O, RANK_STEP), tl.float32)
    # V R^T here, not above: registers are scarce until the first parts of V are stored.
    for part in tl.static_range(I // (SPLITS * WIDTH)):
        v = kept[part]
        other = _turned_part(basis, part * SPLITS * WIDTH, I, R, RANK_STEP, SPLITS, XS)
        cross = norms_dot(v, other, cross, PRECISION, NARROW, UPCAST)
        made = memory_order((v * factor[None, :, None]).to(product.dtype.element_ty), SPLITS, BLOCK_O)
        tl.store(formed_rows + (cols + part * SPLITS * WIDTH), made, mask=spread_ok)
    rank = _turned_ranks(RANK_STEP)
    place = floats + field(layers, layer, ROW_CROSS, 16) + rows.to(tl.int64)[:, None] * R + rank[None, :]
    tl.store(place, tl.sum(cross, axis=0), mask=rows_ok[:, None] & (rank < R)[None, :])


@triton.jit
def instruction_order(tile, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """(8, SPLITS, BLOCK_O / 8, WIDTH), as loaded, to (SPLITS, BLOCK_O, WIDTH)."""
    # (g, split, h, t, e, j) to (split, h, g, j, t, e)
    some = tl.permute(tl.reshape(tile, (8, SPLITS, BLOCK_O // 8, 4, 2, 4)), (1, 2, 0, 5, 3, 4))
    return tl.reshape(some, (SPLITS, BLOCK_O, WIDTH))


@triton.jit
def memory_order(tile, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """The way back."""
    some = tl.permute(tl.reshape(tile, (SPLITS, BLOCK_O // 8, 8, 4, 4, 2)), (2, 0, 1, 4, 5, 3))
    return tl.reshape(some, (8, SPLITS, BLOCK_O // 8, WIDTH))


@triton.jit
def _right_part(right, start, I: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, SPLITS: tl.constexpr):
    """R (SPLITS, RANK_STEP, WIDTH) from column ``start`` on, in the instruction's order."""
    # (k, t and e, split, q, j): rank 4 q + k, column 4 (t and e) + j
    rank = tl.arange(0, 4)[:, None, None, None, None]
    rank += 4 * tl.arange(0, RANK_STEP // 4)[None, None, None, :, None]
    cols = tl.arange(0, SPLITS)[None, None, :, None, None] * WIDTH + start
    cols += 4 * tl.arange(0, 8)[None, :, None, None, None] + tl.arange(0, 4)[None, None, None, None, :]
    some = tl.load(right + rank * I + cols, mask=rank < R, other=0.0)
    return tl.reshape(tl.permute(some, (2, 3, 0, 4, 1)), (SPLITS, RANK_STEP, WIDTH))


@triton.jit
def _turned_part(
    right, start, I: tl.constexpr, R: tl.constexpr, RANK_STEP: tl.constexpr, SPLITS: tl.constexpr, XS: tl.constexpr
):
    """R^T, or Q for -xs, (SPLITS, WIDTH, RANK_STEP), likewise; its ranks in the order of ``_turned_ranks``."""
    # (t, g, split, e, j, h): rank RANK_STEP / 8 g + h, column 8 t + 4 e + j
    rank = RANK_STEP // 8 * tl.arange(0, 8)[None, :, None, None, None, None]
    rank += tl.arange(0, RANK_STEP // 8)[None, None, None, None, None, :]
    cols = tl.arange(0, SPLITS)[None, None, :, None, None, None] * WIDTH + start
    cols += 8 * tl.arange(0, 4)[:, None, None, None, None, None]
    cols += 4 * tl.arange(0, 2)[None, None, None, :, None, None] + tl.arange(0, 4)[None, None, None, None, :, None]
    if XS:
        some = tl.load(right + cols * R + rank, mask=rank < R, other=0.0)
    else:
        some = tl.load(right + rank * I + cols, mask=rank < R, other=0.0)
    return tl.reshape(tl.permute(some, (2, 4, 0, 3, 5, 1)), (SPLITS, WIDTH, RANK_STEP))


@triton.jit
def _turned_ranks(RANK_STEP: tl.constexpr):
    """The rank of each column of ``_turned_part``."""
    place = tl.arange(0, RANK_STEP)
    return place % 8 * (RANK_STEP // 8) + place // 8
