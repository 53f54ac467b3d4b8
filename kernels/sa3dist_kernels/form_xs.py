"""FORM of -xs types: what it takes of W0 was multiplied with the frozen bases once per run.

    V Q = W0 Q + s U M Q^T Q        n^2 = rows of W0^2 + s rowdot((W0 Q + V Q) M^T, U)
    E = U^T W0 + s U^T U R          c^2 = columns of W0^2 + s coldot(U^T W0 + E, R)

So the norms of V take no read of W0; those of the columns of diag(g) V do. Where a row or column all but vanishes they
lose digits that squares of V would keep.

Legend: O fan_out, I fan_in, R rank.
"""

import triton
import triton.language as tl

from sa3dist_kernels.formed_tiles import (
    BASIS,
    COL_CROSS,
    COL_SQUARES,
    CORE,
    CORE_GRAM,
    FAN_IN,
    LEFT,
    LEFT_GRAM,
    LEFT_WEIGHT,
    RIGHT,
    RIGHT_GRAM,
    RIGHT_OUT,
    ROW_CROSS,
    ROW_SQUARES,
    WEIGHT_RIGHT,
    basis_tile,
    field,
    left_tile,
    program,
    right_tile,
    vector,
)


@triton.jit
def form_core_kernel(
    floats, product, layers, programs,
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE_I: tl.constexpr, WIDE_T: tl.constexpr,
    BLOCK_I: tl.constexpr, RANK_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R = M Q^T of an -xs type, a block of columns; and R' = Q^T where the columns are not scaled.

    Where the rows are scaled, also M Q^T Q.
    """
    layer, block, _ = program(programs)
    I = field(layers, layer, FAN_IN, WIDE_I)
    core, basis = floats + field(layers, layer, CORE, WIDE_T), floats + field(layers, layer, BASIS, WIDE_T)
    cols = block * BLOCK_I + tl.arange(0, BLOCK_I)
    cols_ok = cols < I
    right = floats + field(layers, layer, RIGHT, 16)
    _core_times(core, basis, right, cols, cols_ok, I, R, RANK_STEP, BLOCK_I, PRECISION)
    if ROWS:
        gram, made = floats + field(layers, layer, RIGHT_GRAM, 16), floats + field(layers, layer, CORE_GRAM, 16)
        begin = block * BLOCK_I
        while begin < R:
            other = begin + tl.arange(0, BLOCK_I)
            _core_times(core, gram, made, other, other < R, R, R, RANK_STEP, BLOCK_I, PRECISION)
            begin += tl.cdiv(I, BLOCK_I).to(tl.int32) * BLOCK_I
    if not COLS:
        for first in range(0, R, RANK_STEP):
            rank = first + tl.arange(0, RANK_STEP)
            part = basis_tile(basis, cols, cols_ok, first, R, RANK_STEP).to(product.dtype.element_ty)
            place = product + field(layers, layer, RIGHT_OUT, 16) + rank[:, None].to(tl.int64) * I + cols[None, :]
            tl.store(place, part, mask=(rank < R)[:, None] & cols_ok[None, :])


@triton.jit
def _core_times(
    core, basis, result, cols, cols_ok, width,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns ``cols`` of ``result`` (R, width): M times those of the transpose of ``basis`` (width, R)."""
    for first in range(0, R, RANK_STEP):
        rank = first + tl.arange(0, RANK_STEP)
        made = tl.zeros((RANK_STEP, BLOCK_I), tl.float32)
        for inner in range(0, R, RANK_STEP):
            square = left_tile(core, rank, rank < R, inner, R, RANK_STEP)
            other = basis_tile(basis, cols, cols_ok, inner, R, RANK_STEP)
            made = tl.dot(square, other, made, input_precision=PRECISION)
        place = result + rank[:, None].to(tl.int64) * width + cols[None, :]
        tl.store(place, made, mask=(rank < R)[:, None] & cols_ok[None, :])


@triton.jit
def row_squares(
    floats, layers, layer, rows, rows_ok, scale, O,
    R: tl.constexpr, RANK_STEP: tl.constexpr, WIDE_T: tl.constexpr, BLOCK_O: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of an -xs type: sums of squares of a block of rows of V, without W0. Stores V Q."""
    left, core = floats + field(layers, layer, LEFT, WIDE_T), floats + field(layers, layer, CORE, WIDE_T)
    known, turned = floats + field(layers, layer, WEIGHT_RIGHT, WIDE_T), floats + field(layers, layer, CORE_GRAM, 16)
    update = tl.zeros((BLOCK_O,), tl.float32)
    for first in range(0, R, RANK_STEP):
        rank = first + tl.arange(0, RANK_STEP)
        cross = tl.zeros((BLOCK_O, RANK_STEP), tl.float32)
        for inner in range(0, R, RANK_STEP):
            some = left_tile(left, rows, rows_ok, inner, R, RANK_STEP)
            part = right_tile(turned, rank, rank < R, inner, R, R, RANK_STEP)
            cross = tl.dot(some, part, cross, input_precision=EXACT)
        frozen = left_tile(known, rows, rows_ok, first, R, RANK_STEP)
        cross = frozen + scale * cross
        store_row_cross(floats, layers, layer, rows, rows_ok, first, cross, R, RANK_STEP)
        for inner in range(0, R, RANK_STEP):
            other = inner + tl.arange(0, RANK_STEP)
            square = left_tile(core, other, other < R, first, R, RANK_STEP)
            found = tl.dot(frozen + cross, tl.trans(square), input_precision=EXACT)
            update += tl.sum(found * left_tile(left, rows, rows_ok, inner, R, RANK_STEP), axis=1)
    return _not_negative(vector(floats, layers, layer, ROW_SQUARES, rows, O) + scale * update)


@triton.jit
def col_squares(
    floats, layers, layer, cols, cols_ok, scale, I,
    R: tl.constexpr, RANK_STEP: tl.constexpr, WIDE_T: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of an -xs type whose rows are not scaled: sums of squares of a block of columns of V, without W0. Stores E."""
    known, right = floats + field(layers, layer, LEFT_WEIGHT, WIDE_T), floats + field(layers, layer, RIGHT, WIDE_T)
    gram = floats + field(layers, layer, LEFT_GRAM, 16)
    update = tl.zeros((BLOCK_I,), tl.float32)
    for first in range(0, R, RANK_STEP):
        rank = first + tl.arange(0, RANK_STEP)
        cross = tl.zeros((RANK_STEP, BLOCK_I), tl.float32)
        for inner in range(0, R, RANK_STEP):
            square = left_tile(gram, rank, rank < R, inner, R, RANK_STEP)
            part = right_tile(right, cols, cols_ok, inner, I, R, RANK_STEP)
            cross = tl.dot(square, part, cross, input_precision=PRECISION)
        frozen = right_tile(known, cols, cols_ok, first, I, R, RANK_STEP)
        cross = frozen + scale * cross
        update += tl.sum((frozen + cross) * right_tile(right, cols, cols_ok, first, I, R, RANK_STEP), axis=0)
        place = floats + field(layers, layer, COL_CROSS, 16) + rank[:, None].to(tl.int64) * I + cols[None, :]
        tl.store(place, cross, mask=(rank < R)[:, None] & cols_ok[None, :])
    return _not_negative(vector(floats, layers, layer, COL_SQUARES, cols, I) + scale * update)


@triton.jit
def _not_negative(squares):
    """Rounding can leave a sum of squares below zero; a NaN stays one."""
    return tl.where(squares < 0, 0.0, squares)


@triton.jit
def store_row_cross(floats, layers, layer, rows, rows_ok, first, cross, R: tl.constexpr, RANK_STEP: tl.constexpr):
    rank = first + tl.arange(0, RANK_STEP)
    place = floats + field(layers, layer, ROW_CROSS, 16) + rows[:, None] * R + rank[None, :]
    tl.store(place, cross, mask=rows_ok[:, None] & (rank < R)[None, :])
