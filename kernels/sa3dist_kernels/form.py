"""FORM: the effective weights W' of all adapted layers, once per optimiser step, in a few launches.

    V = W0 + s L R                  n = |rows of V|                  g = row magnitude / (n + eps)
    W' = diag(g~) V diag(h~)        c = |columns of diag(g) V|       h = column magnitude / (c + eps)
    L' = diag(g) L                  R' = R diag(h)                   -xs: L = U, R = M Q^T, and R' = Q^T diag(h)

g and h are 1 where a type does not scale that side; g~ and h~ are kept away from zero (``floored``). FORM also stores
what FINISH reads: g, n, h and c; V R^T (V Q for -xs) if rows are scaled; E = (diag(g^2) L)^T V if columns are.

rows      A program takes a block of rows. It computes norms and V R^T in one pass over the columns and W' in a second
          one, or keeps the rows in registers (``form_resident.py``). If columns are scaled too, a later launch writes
          W'.
columns   A program takes a block of columns and a span of rows; ``close`` adds up the spans in a fixed order.
-xs       The norms of V need no read of W0 (``form_xs.py``); the column norms of diag(g) V do.

Legend: O fan_out, I fan_in, R rank.
"""

import triton
import triton.language as tl

from sa3dist_kernels.form_xs import col_squares, row_squares, store_row_cross
from sa3dist_kernels.formed_tiles import (
    BASIS,
    COL_CROSS,
    COL_GAIN,
    COL_GAIN_FLOORED,
    COL_MAGNITUDE,
    COL_NORM,
    COL_SLOPE_FACTOR,
    EPS,
    FAN_IN,
    FAN_OUT,
    FORMED,
    LEFT,
    LEFT_OUT,
    PARTIAL,
    PARTIAL_SQUARES,
    RIGHT,
    RIGHT_OUT,
    ROW_GAIN,
    ROW_MAGNITUDE,
    ROW_NORM,
    SPLIT_COUNT,
    WEIGHT,
    basis_tile,
    field,
    floored,
    left_tile,
    loop_to,
    program,
    right_tile,
    row_sweep,
    row_tiles,
    slope,
    split_left,
    vector,
    weight_tiles,
)


@triton.jit
def form_rows_kernel(
    floats, weight, product, scales, layers, programs,
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, XS: tl.constexpr, NORMS: tl.constexpr, WRITE: tl.constexpr,
    LOOP_I: tl.constexpr, ALIGN_I: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_R: tl.constexpr, ALIGN_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, SPLITS: tl.constexpr, RANK_STEP: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """For a block of rows. NORMS: compute n, g and V R^T. WRITE: write W', L' and R' with the gains known so far."""
    layer, block, _ = program(programs)
    O, I = field(layers, layer, FAN_OUT, 1), field(layers, layer, FAN_IN, ALIGN_I)
    scale = tl.load(scales + layer)
    rows = block.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows_ok = rows < O
    gain = tl.full((BLOCK_O,), 1.0, tl.float32)
    if NORMS:
        squares = tl.zeros((BLOCK_O,), tl.float32)
        if XS:
            squares = row_squares(floats, layers, layer, rows, rows_ok, scale, O, R, RANK_STEP, ALIGN_T, BLOCK_O, EXACT)
        else:
            for first in range(0, R, RANK_STEP):
                squares, cross = row_sweep(
                    floats, weight, layers, layer, rows, rows_ok, first, scale, O, I, R, RANK_STEP, False, True,
                    LOOP_I, ALIGN_W, ALIGN_R, ALIGN_T, BLOCK_O, BLOCK_J, SPLITS, PRECISION, NARROW, UPCAST, STAGES,
                )  # fmt: skip
                store_row_cross(floats, layers, layer, rows, rows_ok, first, cross, R, RANK_STEP)
        norm = tl.sqrt(squares)
        gain = vector(floats, layers, layer, ROW_MAGNITUDE, rows, O) / (norm + EPS)
        tl.store(floats + field(layers, layer, ROW_NORM, 16) + rows, norm, mask=rows_ok)
        tl.store(floats + field(layers, layer, ROW_GAIN, 16) + rows, gain, mask=rows_ok)
    elif ROWS:
        gain = vector(floats, layers, layer, ROW_GAIN, rows, O)
    if WRITE:
        _write(
            floats, weight, product, layers, layer, block, rows, rows_ok, gain, scale, O, I, R, ROWS, COLS, XS,
            LOOP_I, ALIGN_W, ALIGN_R, BLOCK_O, BLOCK_J, SPLITS, RANK_STEP, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _write(
    floats, weight, product, layers, layer, block, rows, rows_ok, gain, scale, O, I,
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, XS: tl.constexpr,
    LOOP_I: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_R: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, SPLITS: tl.constexpr, RANK_STEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W' of a block of rows, L' and R'."""
    weight_rows = weight + field(layers, layer, WEIGHT, ALIGN_W) + rows * I
    formed_rows = product + field(layers, layer, FORMED, 16) + rows * I
    left, right = floats + field(layers, layer, LEFT, ALIGN_R), floats + field(layers, layer, RIGHT, ALIGN_R)
    write_left(product, layers, layer, left, rows, rows_ok, gain, R, RANK_STEP)
    if not COLS and not XS:
        write_right(product, layers, layer, right, block, O, I, R, BLOCK_O, BLOCK_J, RANK_STEP)
    scaled_left = split_left(scale * left_tile(left, rows, rows_ok, 0, R, RANK_STEP), SPLITS, BLOCK_O, RANK_STEP)
    columns = tl.arange(0, SPLITS)[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    width = I.to(tl.int32)
    if ROWS:
        gain = floored(gain)
    for start in tl.range(0, loop_to(I, LOOP_I), SPLITS * BLOCK_J, num_stages=STAGES):
        cols = start + columns
        cols_ok = cols < width
        tiles = weight_tiles(weight_rows, rows_ok, cols, cols_ok, False)
        v, _ = row_tiles(
            tiles, left, right, scaled_left, scale, rows, rows_ok, cols, cols_ok, I, R, RANK_STEP, BLOCK_O, SPLITS,
            PRECISION,
        )  # fmt: skip
        if ROWS:
            v = v * gain[None, :, None]
        if COLS:
            v = v * vector(floats, layers, layer, COL_GAIN_FLOORED, cols, I)[:, None, :]
        mask = rows_ok[None, :, None] & cols_ok[:, None, :]
        pointers = formed_rows[None, :, None] + cols[:, None, :]
        tl.store(pointers, v.to(product.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def write_left(product, layers, layer, left, rows, rows_ok, gain, R: tl.constexpr, RANK_STEP: tl.constexpr):
    """L' of a block of rows."""
    for first in range(0, R, RANK_STEP):
        rank = first + tl.arange(0, RANK_STEP)
        scaled = left_tile(left, rows, rows_ok, first, R, RANK_STEP) * gain[:, None]
        pointers = product + field(layers, layer, LEFT_OUT, 16) + rows[:, None] * R + rank[None, :]
        tl.store(pointers, scaled.to(product.dtype.element_ty), mask=rows_ok[:, None] & (rank < R)[None, :])


@triton.jit
def write_right(
    product, layers, layer, right, block, O, I, R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr,
    RANK_STEP: tl.constexpr,
):  # fmt: skip
    """R' = R of unscaled columns. Each block of rows writes every (O / BLOCK_O)th block of BLOCK_J columns."""
    begin = block * BLOCK_J
    while begin < I:
        cols = begin + tl.arange(0, BLOCK_J)
        for first in range(0, R, RANK_STEP):
            rank = first + tl.arange(0, RANK_STEP)
            part = right_tile(right, cols, cols < I, first, I, R, RANK_STEP).to(product.dtype.element_ty)
            pointers = product + field(layers, layer, RIGHT_OUT, 16) + rank[:, None].to(tl.int64) * I + cols[None, :]
            tl.store(pointers, part, mask=(rank < R)[:, None] & (cols < I)[None, :])
        begin += tl.cdiv(O, BLOCK_O).to(tl.int32) * BLOCK_J


@triton.jit
def form_close_kernel(
    floats, product, scales, layers, programs,
    R: tl.constexpr, ROWS: tl.constexpr, XS: tl.constexpr, LOOP_SPLITS: tl.constexpr, ALIGN_I: tl.constexpr,
    ALIGN_T: tl.constexpr, BLOCK_I: tl.constexpr, RANK_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c, h, h~, q / s_h, E and R' of a block of columns."""
    layer, block, _ = program(programs)
    I = field(layers, layer, FAN_IN, ALIGN_I)
    cols = block * BLOCK_I + tl.arange(0, BLOCK_I)
    cols_ok = cols < I
    if XS and not ROWS:
        scale = tl.load(scales + layer)
        squares = col_squares(floats, layers, layer, cols, cols_ok, scale, I, R, RANK_STEP, ALIGN_T, BLOCK_I, PRECISION)
    else:
        squares = _reduce_spans(floats, layers, layer, cols, cols_ok, I, R, RANK_STEP, LOOP_SPLITS, BLOCK_I)
    norm = tl.sqrt(squares)
    gain = vector(floats, layers, layer, COL_MAGNITUDE, cols, I) / (norm + EPS)
    tl.store(floats + field(layers, layer, COL_NORM, 16) + cols, norm, mask=cols_ok)
    tl.store(floats + field(layers, layer, COL_GAIN, 16) + cols, gain, mask=cols_ok)
    gain_floored = floored(gain)
    tl.store(floats + field(layers, layer, COL_GAIN_FLOORED, 16) + cols, gain_floored, mask=cols_ok)
    # q / s_h. Within float32's range: the smallest norm above zero is the root of the smallest square, 4e-23.
    slope_factor = slope(1.0 / (norm + EPS), gain / gain_floored, norm)
    tl.store(floats + field(layers, layer, COL_SLOPE_FACTOR, 16) + cols, slope_factor, mask=cols_ok)
    for first in range(0, R, RANK_STEP):
        if XS:
            part = basis_tile(floats + field(layers, layer, BASIS, ALIGN_T), cols, cols_ok, first, R, RANK_STEP)
        else:
            part = right_tile(floats + field(layers, layer, RIGHT, ALIGN_T), cols, cols_ok, first, I, R, RANK_STEP)
        rank = first + tl.arange(0, RANK_STEP)
        pointers = product + field(layers, layer, RIGHT_OUT, 16) + rank[:, None].to(tl.int64) * I + cols[None, :]
        scaled = (part * gain[None, :]).to(product.dtype.element_ty)
        tl.store(pointers, scaled, mask=(rank < R)[:, None] & cols_ok[None, :])


@triton.jit
def _reduce_spans(
    floats, layers, layer, cols, cols_ok, I,
    R: tl.constexpr, RANK_STEP: tl.constexpr, LOOP_SPLITS: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Add up the spans of rows for a block of columns: returns its sums of squares, stores E."""
    splits = field(layers, layer, SPLIT_COUNT, 1)
    squares = tl.zeros((BLOCK_I,), tl.float32)
    for split in range(loop_to(splits, LOOP_SPLITS)):
        partial = floats + field(layers, layer, PARTIAL_SQUARES, 16) + split * I + cols
        squares += tl.load(partial, mask=cols_ok & (split < splits), other=0.0)
    for first in range(0, R, RANK_STEP):
        rank = first + tl.arange(0, RANK_STEP)
        inside = (rank < R)[:, None] & cols_ok[None, :]
        offsets = rank[:, None].to(tl.int64) * I + cols[None, :]
        cross = tl.zeros((RANK_STEP, BLOCK_I), tl.float32)
        for split in range(loop_to(splits, LOOP_SPLITS)):
            partial = floats + field(layers, layer, PARTIAL, 16) + split * R * I
            cross += tl.load(partial + offsets, mask=inside & (split < splits), other=0.0)
        tl.store(floats + field(layers, layer, COL_CROSS, 16) + offsets, cross, mask=inside)
    return squares
