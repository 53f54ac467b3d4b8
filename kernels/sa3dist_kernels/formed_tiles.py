"""Device functions that FORM and FINISH share: offsets of a layer's tensors, and tiles of V = W0 + s L R on chip.

One launch serves layers of many shapes. A program looks up its layer and block in ``programs`` (P, 3), and where that
layer's tensors lie in ``layers`` (G, FIELD_COUNT): sizes, and element offsets from three bases, ``floats`` (float32:
the trained tensors, their gradients, bases of -xs types, the statistics), ``weight`` (W0), ``product`` (W', L', R').

A tile of a block of rows is (SPLITS, BLOCK_O, BLOCK_J): SPLITS neighbouring spans of columns, one to a warp, each with
its own sums, added at the end. So no warp needs what another one formed.

Legend: O fan_out, I fan_in, R rank, RANK_STEP the part of the rank that is held at once.
"""

import triton
import triton.language as tl

from sa3dist_kernels.triton_support import dot

# Added to the norm, not to its square: part of the file format.
EPS = tl.constexpr(1e-12)
# Least size of a gain that enters W': z / gain keeps its digits, and no rounding sees 2^-40 of an output.
FLOOR = tl.constexpr(2.0**-40)

# Columns of a warp's tile where rows are kept in registers (``form_kept.py``).
KEPT_WIDTH = 32

FIELDS = (
    "fan_out", "fan_in", "weight", "formed", "left_out", "right_out", "left", "right", "core", "basis",
    "row_magnitude", "col_magnitude", "grad_left", "grad_right", "grad_core", "grad_row", "grad_col",
    "row_gain", "row_norm", "row_slope", "row_cross", "col_gain", "col_kept", "col_norm", "col_rate", "col_cross",
    "partial", "partial_squares", "splits",
    "row_squares", "col_squares", "weight_right", "left_weight", "right_gram", "left_gram", "core_gram",
)  # fmt: skip
FIELD_COUNT = tl.constexpr(len(FIELDS))
(
    FAN_OUT, FAN_IN, WEIGHT, FORMED, LEFT_OUT, RIGHT_OUT, LEFT, RIGHT, CORE, BASIS,
    ROW_MAGNITUDE, COL_MAGNITUDE, GRAD_LEFT, GRAD_RIGHT, GRAD_CORE, GRAD_ROW, GRAD_COL,
    ROW_GAIN, ROW_NORM, ROW_SLOPE, ROW_CROSS, COL_GAIN, COL_KEPT, COL_NORM, COL_RATE, COL_CROSS,
    PARTIAL, PARTIAL_SQUARES, SPLIT_COUNT,
    ROW_SQUARES, COL_SQUARES, WEIGHT_RIGHT, LEFT_WEIGHT, RIGHT_GRAM, LEFT_GRAM, CORE_GRAM,
) = map(tl.constexpr, range(len(FIELDS)))  # fmt: skip


@triton.jit
def field(layers, layer, NAME: tl.constexpr, MULTIPLE: tl.constexpr):
    """A size or an offset of one layer, a multiple of MULTIPLE."""
    return tl.multiple_of(tl.load(layers + layer * FIELD_COUNT + NAME), MULTIPLE)


@triton.jit
def program(programs):
    """Layer, block and split of this program."""
    place = programs + tl.program_id(0).to(tl.int64) * 3
    return tl.load(place), tl.load(place + 1), tl.load(place + 2)


@triton.jit
def loop_to(size, LOOP: tl.constexpr):
    """Where a loop ends: at a size from the table or, in the interpreter, which cannot, at LOOP, which is no less."""
    if LOOP > 0:
        return LOOP
    else:
        return size.to(tl.int32)


@triton.jit
def vector(floats, layers, layer, NAME: tl.constexpr, index, size):
    """Elements ``index`` of a vector of ``size`` numbers; zero beyond."""
    return tl.load(floats + field(layers, layer, NAME, 1) + index, mask=index < size, other=0.0)


@triton.jit
def floored(gain):
    """The gain that W' is formed with; a NaN stays one."""
    return tl.where(tl.abs(gain) < FLOOR, tl.where(gain < 0, -FLOOR, FLOOR), gain)


@triton.jit
def slope(grad_magnitude, gain, norm):
    """What a norm adds to the gradient of V, over V: -gain grad_gain / ((norm + eps) norm); zero where the norm is."""
    # grad_magnitude is grad_gain / (norm + eps). In this order nothing leaves float32's range that the result does not.
    found = -grad_magnitude * gain / tl.where(norm == 0, 1.0, norm)
    return tl.where(norm == 0, 0.0, found)


@triton.jit
def col_slope(floats, layers, layer, cols, I):
    """q of columns ``cols`` from their raw sums s_h."""
    return vector(floats, layers, layer, GRAD_COL, cols, I) * vector(floats, layers, layer, COL_RATE, cols, I)


@triton.jit
def left_tile(left, rows, rows_ok, first, R: tl.constexpr, RANK_STEP: tl.constexpr):
    """L (BLOCK_O, RANK_STEP) from rank ``first`` on."""
    rank = first + tl.arange(0, RANK_STEP)
    return tl.load(left + rows[:, None] * R + rank[None, :], mask=rows_ok[:, None] & (rank < R)[None, :], other=0.0)


@triton.jit
def right_tiles(right, cols, cols_ok, first, I, R: tl.constexpr, RANK_STEP: tl.constexpr):
    """R (SPLITS, RANK_STEP, BLOCK_J) from rank ``first`` on."""
    rank = first + tl.arange(0, RANK_STEP)
    mask = (rank < R)[None, :, None] & cols_ok[:, None, :]
    return tl.load(right + rank[None, :, None].to(tl.int64) * I + cols[:, None, :], mask=mask, other=0.0)


@triton.jit
def right_tile(right, cols, cols_ok, first, I, R: tl.constexpr, RANK_STEP: tl.constexpr):
    """R (RANK_STEP, columns) from rank ``first`` on."""
    rank = first + tl.arange(0, RANK_STEP)
    mask = (rank < R)[:, None] & cols_ok[None, :]
    return tl.load(right + rank[:, None].to(tl.int64) * I + cols[None, :], mask=mask, other=0.0)


@triton.jit
def basis_tile(basis, cols, cols_ok, first, R: tl.constexpr, RANK_STEP: tl.constexpr):
    """Q^T (RANK_STEP, columns) of an -xs type from rank ``first`` on."""
    rank = first + tl.arange(0, RANK_STEP)
    mask = (rank < R)[:, None] & cols_ok[None, :]
    return tl.load(basis + rank[:, None] + cols[None, :].to(tl.int64) * R, mask=mask, other=0.0)


@triton.jit
def norms_dot(left, right, acc, PRECISION: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr):
    """acc + left @ right of what only the norms' gradient sees; NARROW: of bfloat16 operands."""
    if NARROW:
        return dot(left.to(tl.bfloat16), right.to(tl.bfloat16), acc, PRECISION, UPCAST)
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def split_left(left, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr, RANK_STEP: tl.constexpr):
    return tl.broadcast_to(left[None, :, :], (SPLITS, BLOCK_O, RANK_STEP))


@triton.jit
def weight_tiles(weight_rows, rows_ok, cols, cols_ok, AGAIN: tl.constexpr):
    """W0 (SPLITS, BLOCK_O, BLOCK_J), zero outside; AGAIN: whether it will soon be read once more.

    weight_rows  pointers (BLOCK_O,) to the rows' first elements
    """
    mask = rows_ok[None, :, None] & cols_ok[:, None, :]
    place = weight_rows[None, :, None] + cols[:, None, :]
    if AGAIN:
        # Not in the first-level cache, which is for R: all programs of a multiprocessor read that.
        return tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        return tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def row_tiles(
    tiles, left, right, held, scale, rows, rows_ok, cols, cols_ok, I,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_O: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """V (SPLITS, BLOCK_O, BLOCK_J), float32, zero outside; and the last part of R it was made from.

    tiles  W0, as ``weight_tiles`` gives it
    held   s L (SPLITS, BLOCK_O, RANK_STEP), used where it is all of it
    """
    v = tiles.to(tl.float32)
    part = right_tiles(right, cols, cols_ok, 0, I, R, RANK_STEP)
    if R <= RANK_STEP:
        v = tl.dot(held, part, v, input_precision=PRECISION)
    else:
        for first in range(0, R, RANK_STEP):
            some = split_left(scale * left_tile(left, rows, rows_ok, first, R, RANK_STEP), SPLITS, BLOCK_O, RANK_STEP)
            part = right_tiles(right, cols, cols_ok, first, I, R, RANK_STEP)
            v = tl.dot(some, part, v, input_precision=PRECISION)
    return v, part


@triton.jit
def row_sweep(
    floats, weight, layers, layer, rows, rows_ok, first, scale, O, I,
    R: tl.constexpr, RANK_STEP: tl.constexpr, SLOPED: tl.constexpr, CROSS: tl.constexpr,
    LOOP_I: tl.constexpr, WIDE_W: tl.constexpr, WIDE_R: tl.constexpr, WIDE_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
    UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a block of rows: sums of squares of V (BLOCK_O,), and V R^T at ranks ``first`` on.

    SLOPED weights both with q: (V.V) q and V (R.q)^T. CROSS: whether the product is wanted (else zeros).
    """
    weight_rows = weight + field(layers, layer, WEIGHT, WIDE_W) + rows * I
    left, right = floats + field(layers, layer, LEFT, WIDE_T), floats + field(layers, layer, RIGHT, WIDE_R)
    held = split_left(scale * left_tile(left, rows, rows_ok, 0, R, RANK_STEP), SPLITS, BLOCK_O, RANK_STEP)
    places = tl.arange(0, SPLITS)[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    width = I.to(tl.int32)
    # By the eight columns that threads of one row hold, so that they need not meet before the end.
    squares = tl.zeros((SPLITS, BLOCK_O, 8), tl.float32)
    cross = tl.zeros((SPLITS, BLOCK_O, RANK_STEP), tl.float32)
    for start in tl.range(0, loop_to(I, LOOP_I), SPLITS * BLOCK_J, num_stages=STAGES):
        cols = start + places
        cols_ok = cols < width
        tiles = weight_tiles(weight_rows, rows_ok, cols, cols_ok, not SLOPED)
        v, part = row_tiles(
            tiles, left, right, held, scale, rows, rows_ok, cols, cols_ok, I, R, RANK_STEP, BLOCK_O, SPLITS,
            PRECISION,
        )  # fmt: skip
        if SLOPED:
            q = col_slope(floats, layers, layer, cols, I)
            found = v * v * q[:, None, :]
        else:
            found = v * v
        squares += tl.sum(tl.reshape(found, (SPLITS, BLOCK_O, BLOCK_J // 8, 8)), axis=2)
        if CROSS:
            if R > RANK_STEP:
                part = right_tiles(right, cols, cols_ok, first, I, R, RANK_STEP)
            if SLOPED:
                part = part * q[:, None, :]
            cross = norms_dot(v, tl.permute(part, (0, 2, 1)), cross, PRECISION, NARROW, UPCAST)
    return tl.sum(tl.sum(squares, axis=2), axis=0), tl.sum(cross, axis=0)
