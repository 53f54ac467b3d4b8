"""FINISH: turns the raw sums of all micro batches into gradients, in place, once per optimiser step, in a few launches.

The gradient tensors hold the raw sums P1 (O, R), P2 (R, I) or PM (R, R), s_g (O) and s_h (I). With what FORM stored,

    columns   dh = s_h / h~     dm_c = dh / (c + eps)     q = - h dm_c / c, or 0      t = (V.V) q
    rows      dg = s_g / g~ + g t     dm_r = dg / (n + eps)     k = - g dm_r / n, or 0
    dL = s (g P1 + g^2 V (R.q)^T + k V R^T)                    dR = s (P2 h + E q + (diag(k) L)^T V)
    -xs       dM = s (PM + (E.q) Q + (diag(k) U)^T (V Q))

without the terms a type does not have. FINISH is linear in the raw sums, so it may run after their all-reduce. A launch
overwrites only what none of its other programs reads: s_h, which all rows need for t, is overwritten last.

rows      A program takes a block of rows. It reads W0 if columns are scaled, for V (R.q)^T and t.
columns   A program takes a block of columns and a span of rows. It reads W0 for (diag(k) L)^T V.
close     Adds up the spans in a fixed order.
core      dM of an -xs type, one tile per program.

Legend: O fan_out, I fan_in, R rank.
"""

import triton
import triton.language as tl

from sa3dist_kernels.formed_tiles import (
    BASIS,
    COL_CROSS,
    COL_GAIN,
    COL_NORM,
    EPS,
    FAN_IN,
    FAN_OUT,
    GRAD_COL,
    GRAD_CORE,
    GRAD_LEFT,
    GRAD_RIGHT,
    GRAD_ROW,
    LEFT,
    PARTIAL,
    ROW_CROSS,
    ROW_GAIN,
    ROW_NORM,
    ROW_SLOPE,
    SPLIT_COUNT,
    col_slope,
    field,
    floored,
    left_tile,
    loop_to,
    program,
    right_tile,
    row_sweep,
    slope,
    vector,
)


@triton.jit
def finish_rows_kernel(
    floats, weight, scales, layers, programs,
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, XS: tl.constexpr,
    LOOP_I: tl.constexpr, ALIGN_I: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_R: tl.constexpr, ALIGN_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, SPLITS: tl.constexpr, RANK_STEP: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dm_r, k and dL of a block of rows."""
    layer, block, _ = program(programs)
    O, I = field(layers, layer, FAN_OUT, 1), field(layers, layer, FAN_IN, ALIGN_I)
    scale = tl.load(scales + layer)
    rows = block.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows_ok = rows < O
    gain = tl.full((BLOCK_O,), 1.0, tl.float32)
    norm, grad_gain_direct, grad, k = gain, gain, gain, gain
    if ROWS:
        gain = vector(floats, layers, layer, ROW_GAIN, rows, O)
        norm = vector(floats, layers, layer, ROW_NORM, rows, O)
        grad_gain_direct = vector(floats, layers, layer, GRAD_ROW, rows, O) / floored(gain)
    # An -xs type has no dL: one pass for t.
    LAST: tl.constexpr = 1 if XS else R
    for first in range(0, LAST, RANK_STEP):
        if COLS and (ROWS or not XS):
            sum_t, cross = row_sweep(
                floats, weight, layers, layer, rows, rows_ok, first, scale, O, I, R, RANK_STEP, True, not XS,
                LOOP_I, ALIGN_W, ALIGN_R, ALIGN_T, BLOCK_O, BLOCK_J, SPLITS, PRECISION, NARROW, UPCAST, STAGES,
            )  # fmt: skip
        if ROWS:
            grad_gain = grad_gain_direct
            if COLS:
                grad_gain = grad_gain_direct + gain * sum_t
            grad = grad_gain / (norm + EPS)
            k = slope(grad, gain, norm)
        if not XS:
            rank = first + tl.arange(0, RANK_STEP)
            inside = rows_ok[:, None] & (rank < R)[None, :]
            grad_left = floats + field(layers, layer, GRAD_LEFT, ALIGN_T) + rows[:, None] * R + rank[None, :]
            left = gain[:, None] * tl.load(grad_left, mask=inside, other=0.0)
            if COLS:
                left += (gain * gain)[:, None] * cross
            if ROWS:
                row_cross = floats + field(layers, layer, ROW_CROSS, 16) + rows[:, None] * R + rank[None, :]
                left += k[:, None] * tl.load(row_cross, mask=inside, other=0.0)
            tl.store(grad_left, scale * left, mask=inside)
    if ROWS:
        tl.store(floats + field(layers, layer, GRAD_ROW, 1) + rows, grad, mask=rows_ok)
        tl.store(floats + field(layers, layer, ROW_SLOPE, 16) + rows, k, mask=rows_ok)


@triton.jit
def finish_close_kernel(
    floats, scales, layers, programs,
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, XS: tl.constexpr, LOOP_SPLITS: tl.constexpr,
    ALIGN_I: tl.constexpr, ALIGN_T: tl.constexpr, BLOCK_I: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """dR and dm_c of a block of columns."""
    layer, block, _ = program(programs)
    I, splits = field(layers, layer, FAN_IN, ALIGN_I), field(layers, layer, SPLIT_COUNT, 1)
    scale = tl.load(scales + layer)
    cols = block * BLOCK_I + tl.arange(0, BLOCK_I)
    cols_ok = cols < I
    if COLS:
        q = col_slope(floats, layers, layer, cols, I)
        gain = vector(floats, layers, layer, COL_GAIN, cols, I)
        norm = vector(floats, layers, layer, COL_NORM, cols, I)
        grad = vector(floats, layers, layer, GRAD_COL, cols, I) / floored(gain) / (norm + EPS)
    # An -xs type has no dR.
    LAST: tl.constexpr = 0 if XS else R
    for first in range(0, LAST, RANK_STEP):
        rank = first + tl.arange(0, RANK_STEP)
        inside = (rank < R)[:, None] & cols_ok[None, :]
        offsets = rank[:, None].to(tl.int64) * I + cols[None, :]
        grad_right = floats + field(layers, layer, GRAD_RIGHT, ALIGN_T) + offsets
        right = tl.load(grad_right, mask=inside, other=0.0)
        if COLS:
            cross = tl.load(floats + field(layers, layer, COL_CROSS, 16) + offsets, mask=inside, other=0.0)
            right = right * gain[None, :] + cross * q[None, :]
        if ROWS:
            for split in range(loop_to(splits, LOOP_SPLITS)):
                partial = floats + field(layers, layer, PARTIAL, 16) + split * R * I
                right += tl.load(partial + offsets, mask=inside & (split < splits), other=0.0)
        tl.store(grad_right, scale * right, mask=inside)
    if COLS:
        tl.store(floats + field(layers, layer, GRAD_COL, 1) + cols, grad, mask=cols_ok)


@triton.jit
def finish_core_kernel(
    floats, scales, layers, programs,
    R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LOOP_I: tl.constexpr, LOOP_O: tl.constexpr,
    ALIGN_I: tl.constexpr, ALIGN_T: tl.constexpr, BLOCK: tl.constexpr, RANK_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dM."""
    layer, down, across = program(programs)
    O, I = field(layers, layer, FAN_OUT, 1), field(layers, layer, FAN_IN, ALIGN_I)
    rank, other = down * RANK_STEP + tl.arange(0, RANK_STEP), across * RANK_STEP + tl.arange(0, RANK_STEP)
    inside = (rank < R)[:, None] & (other < R)[None, :]
    grad_core = floats + field(layers, layer, GRAD_CORE, 1) + rank[:, None] * R + other[None, :]
    core = tl.load(grad_core, mask=inside, other=0.0)
    if COLS:
        col_cross, basis = floats + field(layers, layer, COL_CROSS, 16), floats + field(layers, layer, BASIS, ALIGN_T)
        for start in range(0, loop_to(I, LOOP_I), BLOCK):
            cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
            q = col_slope(floats, layers, layer, cols, I)
            sloped = right_tile(col_cross, cols, cols < I, down * RANK_STEP, I, R, RANK_STEP) * q[None, :]
            basis_part = left_tile(basis, cols, cols < I, across * RANK_STEP, R, RANK_STEP)
            core = tl.dot(sloped, basis_part, core, input_precision=PRECISION)
    if ROWS:
        left, row_cross = floats + field(layers, layer, LEFT, ALIGN_T), floats + field(layers, layer, ROW_CROSS, 16)
        for start in range(0, loop_to(O, LOOP_O), BLOCK):
            rows = (start + tl.arange(0, BLOCK)).to(tl.int64)
            k = vector(floats, layers, layer, ROW_SLOPE, rows, O)
            sloped = left_tile(left, rows, rows < O, down * RANK_STEP, R, RANK_STEP) * k[:, None]
            cross_part = left_tile(row_cross, rows, rows < O, across * RANK_STEP, R, RANK_STEP)
            core = tl.dot(tl.trans(sloped), cross_part, core, input_precision=PRECISION)
    tl.store(grad_core, tl.load(scales + layer) * core, mask=inside)
