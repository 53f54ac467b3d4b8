"""Device functions that FORM and FINISH share: table lookups, and tiles of V = W0 + s L R computed on chip.

One launch serves layers of many shapes. A program looks up its layer and block in ``programs`` (P, 3), and that layer's
sizes and tensors in ``layers`` (G, FIELD_COUNT). Tensors are element offsets from one of three bases: ``floats``
(float32: trained tensors, gradients, bases of -xs types, statistics), ``weight`` (W0) and ``product`` (W', L', R').

A row program works on tiles (SPLITS, BLOCK_O, BLOCK_J): each of SPLITS warps takes BLOCK_J columns and keeps its own
sums, which are added at the end, so that warps exchange nothing in the loop.

Constants of most kernels: ALIGN_I, ALIGN_W, ALIGN_T and ALIGN_R are divisors of fan_in and of the offsets of W0,
trained tensors and R (``Group.alignments``); RANK_STEP is the part of the rank in one tile.

Legend: O fan_out, I fan_in, R rank.
"""

import triton
import triton.language as tl

from sa3dist_kernels.triton_support import dot

# Added to the norm, not to its square: defined by the file format.
EPS = tl.constexpr(1e-12)
# Smallest absolute gain in W', so that z / gain keeps its digits. 2^-40 of an output is lost in rounding.
FLOOR = tl.constexpr(2.0**-40)

# Columns of a warp's tile in ``form_resident.py``.
RESIDENT_WIDTH = 32

FIELDS = (
    "fan_out", "fan_in", "weight", "formed", "left_out", "right_out", "left", "right", "core", "basis",
    "row_magnitude", "col_magnitude", "grad_left", "grad_right", "grad_core", "grad_row", "grad_col",
    "row_gain", "row_norm", "row_slope", "row_cross",
    "col_gain", "col_gain_floored", "col_norm", "col_slope_factor", "col_cross",
    "partial", "partial_squares", "splits",
    "row_squares", "col_squares", "weight_right", "left_weight", "right_gram", "left_gram", "core_gram",
)  # fmt: skip
FIELD_COUNT = tl.constexpr(len(FIELDS))
(
    FAN_OUT, FAN_IN, WEIGHT, FORMED, LEFT_OUT, RIGHT_OUT, LEFT, RIGHT, CORE, BASIS,
    ROW_MAGNITUDE, COL_MAGNITUDE, GRAD_LEFT, GRAD_RIGHT, GRAD_CORE, GRAD_ROW, GRAD_COL,
    ROW_GAIN, ROW_NORM, ROW_SLOPE, ROW_CROSS,
    COL_GAIN, COL_GAIN_FLOORED, COL_NORM, COL_SLOPE_FACTOR, COL_CROSS,
    PARTIAL, PARTIAL_SQUARES, SPLIT_COUNT,
    ROW_SQUARES, COL_SQUARES, WEIGHT_RIGHT, LEFT_WEIGHT, RIGHT_GRAM, LEFT_GRAM, CORE_GRAM,
) = map(tl.constexpr, range(len(FIELDS)))  # fmt: skip


@triton.jit
def field(layers, layer, NAME: tl.constexpr, MULTIPLE: tl.constexpr):
    """One field of a layer's row of the table; the caller guarantees a multiple of MULTIPLE."""
    return tl.multiple_of(tl.load(layers + layer * FIELD_COUNT + NAME), MULTIPLE)


@triton.jit
def program(programs):
    """Layer, block and split of this program."""
    row = programs + tl.program_id(0).to(tl.int64) * 3
    return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def loop_to(size, LOOP: tl.constexpr):
    """Loop bound: ``size``, loaded from a table. The interpreter needs a constant instead: LOOP, at least ``size``."""
    if LOOP > 0:
        return LOOP
    else:
        return size.to(tl.int32)


@triton.jit
def vector(floats, layers, layer, NAME: tl.constexpr, index, size):
    """Elements ``index`` of a layer's vector of ``size`` elements; zero beyond it."""
    return tl.load(floats + field(layers, layer, NAME, 1) + index, mask=index < size, other=0.0)


@triton.jit
def floored(gain):
    """The gain used in W': at least FLOOR in absolute value. NaN stays NaN."""
    return tl.where(tl.abs(gain) < FLOOR, tl.where(gain < 0, -FLOOR, FLOOR), gain)


@triton.jit
def slope(grad_magnitude, gain, norm):
    """The factor k of the norm's contribution k V to the gradient of V; zero where the norm is zero.

    k = -gain grad_gain / ((norm + eps) norm), with grad_magnitude = grad_gain / (norm + eps).
    """
    # In this order no intermediate leaves float32's range unless the result does.
    factor = -grad_magnitude * gain / tl.where(norm == 0, 1.0, norm)
    return tl.where(norm == 0, 0.0, factor)


@triton.jit
def col_slope(floats, layers, layer, cols, I):
    """q of columns ``cols``, from their raw sums s_h."""
    return vector(floats, layers, layer, GRAD_COL, cols, I) * vector(floats, layers, layer, COL_SLOPE_FACTOR, cols, I)


@triton.jit
def left_tile(left, rows, rows_ok, first, R: tl.constexpr, RANK_STEP: tl.constexpr):
    """L (BLOCK_O, RANK_STEP), from rank ``first`` on."""
    rank = first + tl.arange(0, RANK_STEP)
    return tl.load(left + rows[:, None] * R + rank[None, :], mask=rows_ok[:, None] & (rank < R)[None, :], other=0.0)


@triton.jit
def right_tiles(right, cols, cols_ok, first, I, R: tl.constexpr, RANK_STEP: tl.constexpr):
    """R (SPLITS, RANK_STEP, BLOCK_J), from rank ``first`` on."""
    rank = first + tl.arange(0, RANK_STEP)
    mask = (rank < R)[None, :, None] & cols_ok[:, None, :]
    return tl.load(right + rank[None, :, None].to(tl.int64) * I + cols[:, None, :], mask=mask, other=0.0)


@triton.jit
def right_tile(right, cols, cols_ok, first, I, R: tl.constexpr, RANK_STEP: tl.constexpr):
    """R (RANK_STEP, columns), from rank ``first`` on."""
    rank = first + tl.arange(0, RANK_STEP)
    mask = (rank < R)[:, None] & cols_ok[None, :]
    return tl.load(right + rank[:, None].to(tl.int64) * I + cols[None, :], mask=mask, other=0.0)


@triton.jit
def basis_tile(basis, cols, cols_ok, first, R: tl.constexpr, RANK_STEP: tl.constexpr):
    """Q^T (RANK_STEP, columns) of an -xs type, from rank ``first`` on."""
    rank = first + tl.arange(0, RANK_STEP)
    mask = (rank < R)[:, None] & cols_ok[None, :]
    return tl.load(basis + rank[:, None] + cols[None, :].to(tl.int64) * R, mask=mask, other=0.0)


@triton.jit
def norms_dot(left, right, acc, PRECISION: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr):
    """acc + left @ right, for the gradient of the norms only. NARROW takes bfloat16 operands."""
    if NARROW:
        return dot(left.to(tl.bfloat16), right.to(tl.bfloat16), acc, PRECISION, UPCAST)
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def split_left(left, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr, RANK_STEP: tl.constexpr):
    return tl.broadcast_to(left[None, :, :], (SPLITS, BLOCK_O, RANK_STEP))


@triton.jit
def weight_tiles(weight_rows, rows_ok, cols, cols_ok, REUSED: tl.constexpr):
    """W0 (SPLITS, BLOCK_O, BLOCK_J), zero outside.

    weight_rows  pointers (BLOCK_O,) to the rows' first elements
    REUSED       whether this tile is read again soon
    """
    mask = rows_ok[None, :, None] & cols_ok[:, None, :]
    pointers = weight_rows[None, :, None] + cols[:, None, :]
    if REUSED:
        # Bypass the L1 cache: it holds R, which all programs of a multiprocessor read.
        return tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def row_tiles(
    tiles, left, right, scaled_left, scale, rows, rows_ok, cols, cols_ok, I,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_O: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """V (SPLITS, BLOCK_O, BLOCK_J), float32, zero outside; and the last tile of R that was loaded for it.

    tiles        W0, from ``weight_tiles``
    scaled_left  s L (SPLITS, BLOCK_O, RANK_STEP) of the first ranks, used if those are all
    """
    v = tiles.to(tl.float32)
    part = right_tiles(right, cols, cols_ok, 0, I, R, RANK_STEP)
    if R <= RANK_STEP:
        v = tl.dot(scaled_left, part, v, input_precision=PRECISION)
    else:
        for first in range(0, R, RANK_STEP):
            step = split_left(scale * left_tile(left, rows, rows_ok, first, R, RANK_STEP), SPLITS, BLOCK_O, RANK_STEP)
            part = right_tiles(right, cols, cols_ok, first, I, R, RANK_STEP)
            v = tl.dot(step, part, v, input_precision=PRECISION)
    return v, part


@triton.jit
def row_sweep(
    floats, weight, layers, layer, rows, rows_ok, first, scale, O, I,
    R: tl.constexpr, RANK_STEP: tl.constexpr, SLOPED: tl.constexpr, CROSS: tl.constexpr,
    LOOP_I: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_R: tl.constexpr, ALIGN_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
    UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """For a block of rows: sums of squares of V (BLOCK_O,), and V R^T from rank ``first`` on.

    SLOPED  weight both with q: (V.V) q and V (R.q)^T
    CROSS   whether to compute the product; else it is zeros
    """
    weight_rows = weight + field(layers, layer, WEIGHT, ALIGN_W) + rows * I
    left, right = floats + field(layers, layer, LEFT, ALIGN_T), floats + field(layers, layer, RIGHT, ALIGN_R)
    scaled_left = split_left(scale * left_tile(left, rows, rows_ok, 0, R, RANK_STEP), SPLITS, BLOCK_O, RANK_STEP)
    columns = tl.arange(0, SPLITS)[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    width = I.to(tl.int32)
    # Eight partial sums per row, one per column of a thread: threads exchange sums only at the end.
    squares = tl.zeros((SPLITS, BLOCK_O, 8), tl.float32)
    cross = tl.zeros((SPLITS, BLOCK_O, RANK_STEP), tl.float32)
    for start in tl.range(0, loop_to(I, LOOP_I), SPLITS * BLOCK_J, num_stages=STAGES):
        cols = start + columns
        cols_ok = cols < width
        tiles = weight_tiles(weight_rows, rows_ok, cols, cols_ok, not SLOPED)
        v, part = row_tiles(
            tiles, left, right, scaled_left, scale, rows, rows_ok, cols, cols_ok, I, R, RANK_STEP, BLOCK_O, SPLITS,
            PRECISION,
        )  # fmt: skip
        if SLOPED:
            q = col_slope(floats, layers, layer, cols, I)
            terms = v * v * q[:, None, :]
        else:
            terms = v * v
        squares += tl.sum(tl.reshape(terms, (SPLITS, BLOCK_O, BLOCK_J // 8, 8)), axis=2)
        if CROSS:
            if R > RANK_STEP:
                part = right_tiles(right, cols, cols_ok, first, I, R, RANK_STEP)
            if SLOPED:
                part = part * q[:, None, :]
            cross = norms_dot(v, tl.permute(part, (0, 2, 1)), cross, PRECISION, NARROW, UPCAST)
    return tl.sum(tl.sum(squares, axis=2), axis=0), tl.sum(cross, axis=0)
