"""The sums over rows that both FORM and FINISH need, for one block of columns and one span of rows.

    (diag(a) L)^T V     a (V.V)     with V = W0 + s L R and a = 1, g^2 (FORM) or k (FINISH)

Each program writes its share; the closing kernels add them up in a fixed order, so that two runs agree to the last bit.

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
    norms_dot,
    program,
    right_tile,
)


@triton.jit
def rows_to(span, count, BOUNDED: tl.constexpr):
    """Where a loop ends: after the ``count`` rows of a span that exist or, in the interpreter, after all of it."""
    if BOUNDED:
        return count
    else:
        return span


@triton.jit
def column_sweep_kernel(
    floats, weight, scales, layers, programs, span,
    R: tl.constexpr, ROWS: tl.constexpr, SLOPED: tl.constexpr, BOUNDED: tl.constexpr,
    WIDE_I: tl.constexpr, WIDE_W: tl.constexpr, WIDE_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    RANK_STEP: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One span of rows' share of (diag(a) L)^T V (R, I), for a block of columns; a is k if SLOPED, else g^2 or 1.

    Not SLOPED: also of a (V.V) (I,). SLOPED takes (diag(a) L)^T W0 + s ((diag(a) L)^T L) R if the rank fits one step.
    """
    layer, block, split = program(programs)
    O, I = field(layers, layer, FAN_OUT, 1), field(layers, layer, FAN_IN, WIDE_I)
    scale = tl.load(scales + layer)
    begin = split.to(tl.int64) * span
    # Within a span 32 bits reach; its rows are counted from its own start.
    count, stride = tl.minimum(O - begin, span).to(tl.int32), I.to(tl.int32)
    cols = block * BLOCK_I + tl.arange(0, BLOCK_I)
    cols_ok = cols < stride
    weight_rows = weight + field(layers, layer, WEIGHT, WIDE_W) + begin * I
    left, right = floats + field(layers, layer, LEFT, WIDE_T) + begin * R, floats + field(layers, layer, RIGHT, WIDE_T)
    gains = floats
    if SLOPED:
        gains = floats + field(layers, layer, ROW_SLOPE, 16) + begin
    elif ROWS:
        gains = floats + field(layers, layer, ROW_GAIN, 16) + begin
    held = right_tile(right, cols, cols_ok, 0, I, R, RANK_STEP)
    for first in range(0, R, RANK_STEP):
        cross = tl.zeros((RANK_STEP, BLOCK_I), tl.float32)
        gram = tl.zeros((RANK_STEP, RANK_STEP), tl.float32)
        # By the eight rows that threads of one column hold, so that they need not meet before the end.
        squares = tl.zeros((8, BLOCK_I), tl.float32)
        for start in tl.range(0, rows_to(span, count, BOUNDED), BLOCK_O, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_O)
            rows_ok = rows < count
            mask = rows_ok[:, None] & cols_ok[None, :]
            v = tl.load(weight_rows + (rows[:, None] * stride + cols[None, :]), mask=mask, other=0.0).to(tl.float32)
            some = left_tile(left, rows, rows_ok, first, R, RANK_STEP)
            if R > RANK_STEP:
                v = _add_update(v, left, right, scale, rows, rows_ok, cols, cols_ok, I, R, RANK_STEP, PRECISION)
            elif not SLOPED:
                v = tl.dot(scale * some, held, v, input_precision=PRECISION)
            weighted = some
            if SLOPED:
                weighted = some * tl.load(gains + rows, mask=rows_ok, other=0.0)[:, None]
                if R <= RANK_STEP:
                    gram = tl.dot(tl.trans(weighted), some, gram, input_precision=PRECISION)
            else:
                scaled = v
                if ROWS:
                    gain = tl.load(gains + rows, mask=rows_ok, other=0.0)
                    weighted = some * (gain * gain)[:, None]
                    scaled = v * gain[:, None]
                squares += tl.sum(tl.reshape(scaled * scaled, (BLOCK_O // 8, 8, BLOCK_I)), axis=0)
            cross = norms_dot(tl.trans(weighted), v, cross, PRECISION, NARROW, UPCAST)
        if SLOPED and R <= RANK_STEP:
            cross = tl.dot(scale * gram, held, cross, input_precision=PRECISION)
        _store_share(floats, layers, layer, split, cols, I, first, cross, R, RANK_STEP)
        if not SLOPED:
            place = floats + field(layers, layer, PARTIAL_SQUARES, 16) + split.to(tl.int64) * I + cols
            tl.store(place, tl.sum(squares, axis=0), mask=cols_ok)


@triton.jit
def _add_update(
    v, left, right, scale, rows, rows_ok, cols, cols_ok, I, R: tl.constexpr, RANK_STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """v + s L R, a step of the rank at a time."""
    for first in range(0, R, RANK_STEP):
        some = scale * left_tile(left, rows, rows_ok, first, R, RANK_STEP)
        v = tl.dot(some, right_tile(right, cols, cols_ok, first, I, R, RANK_STEP), v, input_precision=PRECISION)
    return v


@triton.jit
def _store_share(floats, layers, layer, split, cols, I, first, cross, R: tl.constexpr, RANK_STEP: tl.constexpr):
    rank = first + tl.arange(0, RANK_STEP)
    place = floats + field(layers, layer, PARTIAL, 16) + split.to(tl.int64) * R * I
    place += rank[:, None].to(tl.int64) * I + cols[None, :]
    tl.store(place, cross, mask=(rank < R)[:, None] & (cols < I)[None, :])
