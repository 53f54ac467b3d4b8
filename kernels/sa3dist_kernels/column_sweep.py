"""The sums over rows that both FORM and FINISH need, for one block of columns and one span of rows.

    (diag(a) L)^T V     a (V.V)     with V = W0 + s L R and a = 1, g^2 (FORM) or k (FINISH)

Each program writes a partial sum. The closing kernels add these up in a fixed order, so results are deterministic.

Legend: O fan_out, I fan_in, R rank.
"""

import triton
import triton.language as tl

from sa3dist_kernels.formed_tiles import (
    FAN_IN,
    FAN_OUT,
    LEFT,
    PARTIAL,
    PARTIAL_SQUARES,
    RIGHT,
    ROW_GAIN,
    ROW_SLOPE,
    WEIGHT,
    field,
    left_tile,
    program,
    right_tile,
)


@triton.jit
def rows_to(span, count, BOUNDED: tl.constexpr):
    """Loop bound: the ``count`` rows of the span that exist; in the interpreter, which needs a constant, all of it."""
    if BOUNDED:
        return count
    else:
        return span


@triton.jit
def column_sweep_kernel(
    floats, weight, scales, layers, programs, span,
    R: tl.constexpr, ROWS: tl.constexpr, SLOPED: tl.constexpr, BOUNDED: tl.constexpr,
    ALIGN_I: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    RANK_STEP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial (diag(a) L)^T V (R, I) of a block of columns and a span of rows; a is k if SLOPED, g^2 if ROWS, else 1.

    Not SLOPED: also a (V.V) (I,). SLOPED takes (diag(a) L)^T W0 + s ((diag(a) L)^T L) R if the rank fits one step.
    """
    layer, block, split = program(programs)
    O, I = field(layers, layer, FAN_OUT, 1), field(layers, layer, FAN_IN, ALIGN_I)
    scale, begin = tl.load(scales + layer), split.to(tl.int64) * span
    # Rows count from the start of the span, so that 32-bit offsets suffice.
    count, stride = tl.minimum(O - begin, span).to(tl.int32), I.to(tl.int32)
    cols = block * BLOCK_I + tl.arange(0, BLOCK_I)
    cols_ok = cols < stride
    weight_rows = weight + field(layers, layer, WEIGHT, ALIGN_W) + begin * I
    left = floats + field(layers, layer, LEFT, ALIGN_T) + begin * R
    right = floats + field(layers, layer, RIGHT, ALIGN_T)
    gains = floats
    if SLOPED:
        gains = floats + field(layers, layer, ROW_SLOPE, 16) + begin
    elif ROWS:
        gains = floats + field(layers, layer, ROW_GAIN, 16) + begin
    first_right = right_tile(right, cols, cols_ok, 0, I, R, RANK_STEP)
    for first in range(0, R, RANK_STEP):
        cross, gram = tl.zeros((RANK_STEP, BLOCK_I), tl.float32), tl.zeros((RANK_STEP, RANK_STEP), tl.float32)
        # Eight partial sums per column, one per row of a thread: threads exchange sums only at the end.
        squares = tl.zeros((8, BLOCK_I), tl.float32)
        for start in tl.range(0, rows_to(span, count, BOUNDED), BLOCK_O, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_O)
            rows_ok = rows < count
            mask = rows_ok[:, None] & cols_ok[None, :]
            v = tl.load(weight_rows + (rows[:, None] * stride + cols[None, :]), mask=mask, other=0.0).to(tl.float32)
            left_part = left_tile(left, rows, rows_ok, first, R, RANK_STEP)
            if R > RANK_STEP:
                v = _add_update(v, left, right, scale, rows, rows_ok, cols, cols_ok, I, R, RANK_STEP, PRECISION)
            elif not SLOPED:
                v = tl.dot(scale * left_part, first_right, v, input_precision=PRECISION)
            weighted = left_part
            if SLOPED:
                weighted = left_part * tl.load(gains + rows, mask=rows_ok, other=0.0)[:, None]
                if R <= RANK_STEP:
                    gram = tl.dot(tl.trans(weighted), left_part, gram, input_precision=PRECISION)
            else:
                scaled = v
                if ROWS:
                    gain = tl.load(gains + rows, mask=rows_ok, other=0.0)
                    weighted = left_part * (gain * gain)[:, None]
                    scaled = v * gain[:, None]
                squares += tl.sum(tl.reshape(scaled * scaled, (BLOCK_O // 8, 8, BLOCK_I)), axis=0)
            cross = tl.dot(tl.trans(weighted), v, cross, input_precision=PRECISION)
        if SLOPED and R <= RANK_STEP:
            cross = tl.dot(scale * gram, first_right, cross, input_precision=PRECISION)
        _store_partial(floats, layers, layer, split, cols, I, first, cross, R, RANK_STEP)
        if not SLOPED:
            partial = floats + field(layers, layer, PARTIAL_SQUARES, 16) + split.to(tl.int64) * I + cols
            tl.store(partial, tl.sum(squares, axis=0), mask=cols_ok)


@triton.jit
def _add_update(
    v, left, right, scale, rows, rows_ok, cols, cols_ok, I, R: tl.constexpr, RANK_STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """v + s L R, in steps of the rank."""
    for first in range(0, R, RANK_STEP):
        scaled_left = scale * left_tile(left, rows, rows_ok, first, R, RANK_STEP)
        v = tl.dot(scaled_left, right_tile(right, cols, cols_ok, first, I, R, RANK_STEP), v, input_precision=PRECISION)
    return v


@triton.jit
def _store_partial(floats, layers, layer, split, cols, I, first, cross, R: tl.constexpr, RANK_STEP: tl.constexpr):
    rank = first + tl.arange(0, RANK_STEP)
    partial = floats + field(layers, layer, PARTIAL, 16) + split.to(tl.int64) * R * I
    partial += rank[:, None].to(tl.int64) * I + cols[None, :]
    tl.store(partial, cross, mask=(rank < R)[:, None] & (cols < I)[None, :])
