"""FORM of -xs types: norms without reading W0, from its products with the frozen bases, computed once per run.

    V Q = W0 Q + s U M Q^T Q        n^2 = rows of W0^2 + s rowdot((W0 Q + V Q) M^T, U)
    E = U^T W0 + s U^T U R          c^2 = columns of W0^2 + s coldot(U^T W0 + E, R)

This holds for the norms of V, not for the column norms of diag(g) V. Rows or columns that nearly vanish lose digits
that squares of V would keep.

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
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN_I: tl.constexpr, ALIGN_T: tl.constexpr,
    BLOCK_I: tl.constexpr, RANK_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R = M Q^T of a block of columns; also R' = Q^T if columns are not scaled, and M Q^T Q if rows are."""
    layer, block, _ = program(programs)
    I = field(layers, layer, FAN_IN, ALIGN_I)
    core, basis = floats + field(layers, layer, CORE, ALIGN_T), floats + field(layers, layer, BASIS, ALIGN_T)
    cols = block * BLOCK_I + tl.arange(0, BLOCK_I)
    cols_ok = cols < I
    right = floats + field(layers, layer, RIGHT, 16)
    _core_times(core, basis, right, cols, cols_ok, I, R, RANK_STEP, BLOCK_I, PRECISION)
    if ROWS:
        gram, core_gram = floats + field(layers, layer, RIGHT_GRAM, 16), floats + field(layers, layer, CORE_GRAM, 16)
        begin = block * BLOCK_I
        while begin < R:
            other = begin + tl.arange(0, BLOCK_I)
            _core_times(core, gram, core_gram, other, other < R, R, R, RANK_STEP, BLOCK_I, PRECISION)
            begin += tl.cdiv(I, BLOCK_I).to(tl.int32) * BLOCK_I
    if not COLS:
        for first in range(0, R, RANK_STEP):
            rank = first + tl.arange(0, RANK_STEP)
            part = basis_tile(basis, cols, cols_ok, first, R, RANK_STEP).to(product.dtype.element_ty)
            pointers = product + field(layers, layer, RIGHT_OUT, 16) + rank[:, None].to(tl.int64) * I + cols[None, :]
            tl.store(pointers, part, mask=(rank < R)[:, None] & cols_ok[None, :])


@triton.jit
def _core_times(
    core, basis, result, cols, cols_ok, width,
    R: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns ``cols`` of ``result`` (R, width) = M @ basis^T, with ``basis`` (width, R)."""
    for first in range(0, R, RANK_STEP):
        rank = first + tl.arange(0, RANK_STEP)
        acc = tl.zeros((RANK_STEP, BLOCK_I), tl.float32)
        for inner in range(0, R, RANK_STEP):
            square = left_tile(core, rank, rank < R, inner, R, RANK_STEP)
            other = basis_tile(basis, cols, cols_ok, inner, R, RANK_STEP)
            acc = tl.dot(square, other, acc, input_precision=PRECISION)
        pointers = result + rank[:, None].to(tl.int64) * width + cols[None, :]
        tl.store(pointers, acc, mask=(rank < R)[:, None] & cols_ok[None, :])


@triton.jit
def row_squares(
    floats, layers, layer, rows, rows_ok, scale, O,
    R: tl.constexpr, RANK_STEP: tl.constexpr, ALIGN_T: tl.constexpr, BLOCK_O: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sums of squares of a block of rows of V, without reading W0. Stores V Q."""
    left, core = floats + field(layers, layer, LEFT, ALIGN_T), floats + field(layers, layer, CORE, ALIGN_T)
    weight_basis = floats + field(layers, layer, WEIGHT_RIGHT, ALIGN_T)
    core_gram = floats + field(layers, layer, CORE_GRAM, 16)
    update = tl.zeros((BLOCK_O,), tl.float32)
    for first in range(0, R, RANK_STEP):
        rank = first + tl.arange(0, RANK_STEP)
        cross = tl.zeros((BLOCK_O, RANK_STEP), tl.float32)
        for inner in range(0, R, RANK_STEP):
            left_part = left_tile(left, rows, rows_ok, inner, R, RANK_STEP)
            gram_part = right_tile(core_gram, rank, rank < R, inner, R, R, RANK_STEP)
            cross = tl.dot(left_part, gram_part, cross, input_precision=EXACT)
        frozen = left_tile(weight_basis, rows, rows_ok, first, R, RANK_STEP)
        cross = frozen + scale * cross
        store_row_cross(floats, layers, layer, rows, rows_ok, first, cross, R, RANK_STEP)
        for inner in range(0, R, RANK_STEP):
            other = inner + tl.arange(0, RANK_STEP)
            square = left_tile(core, other, other < R, first, R, RANK_STEP)
            projected = tl.dot(frozen + cross, tl.trans(square), input_precision=EXACT)
            update += tl.sum(projected * left_tile(left, rows, rows_ok, inner, R, RANK_STEP), axis=1)
    return _not_negative(vector(floats, layers, layer, ROW_SQUARES, rows, O) + scale * update)


@triton.jit
def col_squares(
    floats, layers, layer, cols, cols_ok, scale, I,
    R: tl.constexpr, RANK_STEP: tl.constexpr, ALIGN_T: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of squares of a block of columns of V, without reading W0. Only for unscaled rows. Stores E."""
    basis_weight, right = (
        floats + field(layers, layer, LEFT_WEIGHT, ALIGN_T),
        floats + field(layers, layer, RIGHT, ALIGN_T),
    )
    gram = floats + field(layers, layer, LEFT_GRAM, 16)
    update = tl.zeros((BLOCK_I,), tl.float32)
    for first in range(0, R, RANK_STEP):
        rank = first + tl.arange(0, RANK_STEP)
        cross = tl.zeros((RANK_STEP, BLOCK_I), tl.float32)
        for inner in range(0, R, RANK_STEP):
            square = left_tile(gram, rank, rank < R, inner, R, RANK_STEP)
            part = right_tile(right, cols, cols_ok, inner, I, R, RANK_STEP)
            cross = tl.dot(square, part, cross, input_precision=PRECISION)
        frozen = right_tile(basis_weight, cols, cols_ok, first, I, R, RANK_STEP)
        cross = frozen + scale * cross
        update += tl.sum((frozen + cross) * right_tile(right, cols, cols_ok, first, I, R, RANK_STEP), axis=0)
        pointers = floats + field(layers, layer, COL_CROSS, 16) + rank[:, None].to(tl.int64) * I + cols[None, :]
        tl.store(pointers, cross, mask=(rank < R)[:, None] & cols_ok[None, :])
    return _not_negative(vector(floats, layers, layer, COL_SQUARES, cols, I) + scale * update)


@triton.jit
def _not_negative(squares):
    """Clamp at zero: rounding can make a sum of squares negative. NaN stays NaN."""
    return tl.where(squares < 0, 0.0, squares)


@triton.jit
def store_row_cross(floats, layers, layer, rows, rows_ok, first, cross, R: tl.constexpr, RANK_STEP: tl.constexpr):
    rank = first + tl.arange(0, RANK_STEP)
    pointers = floats + field(layers, layer, ROW_CROSS, 16) + rows[:, None] * R + rank[None, :]
    tl.store(pointers, cross, mask=rows_ok[:, None] & (rank < R)[None, :])
