"""How the sums over tokens of a layer are shared out over programs: grids, block sizes, and where each sum lies.

Legend: N tokens, O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import triton

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.triton_support import interpreting, loop_end, rank_block

# Programs of one launch: two, and in the second kernel eight, for each of an H100's 132 multiprocessors.
PROGRAMS, SUM_PROGRAMS = 264, 1056
# Shares of T and U: every program of the second kernel adds them up again.
MOST_SHARES = 4
# Tokens that are worth a program of their own in the second kernel, and an addition of its result.
LEAST_SPAN = 512


@dataclasses.dataclass(frozen=True)
class SumsPlan:
    """Grids, block sizes and other constants of a layer's launches.

    shares         of T and of U                  thin_spans   channels of one share, of x and of dy
    splits, span   shares of the sums, and tokens of one
    total          length of the result           places       output blocks, and where each trained tensor begins
    kept           of ``triton_support.launch``
    """

    shares: tuple[int, int]
    thin_grid: tuple[int, int, int]
    thin_spans: tuple
    thin: dict
    splits: int
    span: int
    total: int
    core_grid: tuple[int, int, int]
    core: dict
    sums_grid: tuple[int, int, int]
    places: tuple
    sums: dict
    kept: dict = dataclasses.field(default_factory=dict)


# Found once for a shape: with Triton's own slow helpers it took a third of what the host needs for a layer's sums.
@functools.lru_cache(4096)
def plan_of(N: int, I: int, O: int, R: int, kind: AdapterType, dtype: torch.dtype, precision: str) -> SumsPlan:
    block_r = rank_block(R)
    ranks = triton.cdiv(R, block_r)
    (thin_n, thin_k), (x_shares, x_span), (y_shares, y_span) = _share(N, I, O, ranks, dtype)
    loops = _loops(block_r, precision)
    counts = {"X_SHARES": x_shares, "Y_SHARES": y_shares}
    begin, total = offsets(kind, O, I, R)
    block_n, block_m = _sum_blocks(block_r, kind.xs, dtype)
    y_blocks = triton.cdiv(O, block_m) if kind.rows or not kind.xs else 0
    x_blocks = triton.cdiv(I, block_m) if kind.cols or not kind.xs else 0
    # PM has few programs of its own: its spans are as short as T and U allow.
    programs = ranks * ranks if kind.xs else ranks * (y_blocks + x_blocks)
    least = 4 * block_n if kind.xs else LEAST_SPAN
    splits = max(1, min(triton.cdiv(PROGRAMS // 8 if kind.xs else SUM_PROGRAMS, programs), N // least))
    named = "lora_A", "lora_B", kind.row_magnitude, kind.col_magnitude
    types = {"ROWS": kind.rows, "COLS": kind.cols, "XS": kind.xs}
    return SumsPlan(
        shares=(x_shares, y_shares),
        thin_grid=(triton.cdiv(N, thin_n), x_shares + y_shares, ranks),
        thin_spans=(loop_end(x_span), loop_end(y_span)),
        thin=dict(X_SHARES=x_shares, BLOCK_N=thin_n, BLOCK_K=thin_k, BLOCK_R=block_r, **loops, num_warps=4),
        splits=splits,
        span=loop_end(triton.cdiv(triton.cdiv(N, splits), block_n) * block_n),
        total=total,
        core_grid=(splits, ranks, ranks),
        core=dict(**counts, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=4, num_stages=2),
        sums_grid=(y_blocks + x_blocks, splits, 1 if kind.xs else ranks),
        places=(y_blocks, *(begin.get(name, 0) for name in named)),
        sums=dict(**types, **counts, BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_R=block_r, **loops, num_warps=4),
    )


def offsets(kind: AdapterType, O: int, I: int, R: int) -> tuple[dict[str, int], int]:
    """Where each trained tensor's sums begin in the vector, by its name in a file, and the vector's length."""
    begins, end = {}, 0
    for name, shape in kind.parameter_shapes(O, I, R).items():
        begins[name] = end
        end += math.prod(shape)
    return begins, end


def _loops(block_r: int, precision: str) -> dict:
    """Constants of the loops. Tiles of a long rank must fit the shared memory of an A100 too."""
    # Said of the loops: else only what enters a product is loaded ahead.
    return {"STAGES": 3 if block_r <= 32 else 2, "PRECISION": precision, "UPCAST": interpreting()}


def _share(
    N: int, I: int, O: int, ranks: int, dtype: torch.dtype
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Block sizes of the first kernel, then (shares, length) of its sums over I and over O."""
    if interpreting():
        block_n, block_k = 16, 16
    else:
        block_n, block_k = (64 if N > 1024 else 16), 32 if dtype == torch.float32 else 128
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(max(N, 1), block_n) * ranks)
    span = triton.cdiv(triton.cdiv(I + O, max(wanted, 2)), block_k) * block_k

    def shares(side: int) -> tuple[int, int]:
        # One or the most: any number between would be a kernel of its own.
        count = MOST_SHARES if 2 * side > 3 * span else 1
        # Whole blocks may make the last shares empty: they are zeros.
        return count, triton.cdiv(triton.cdiv(side, count), block_k) * block_k

    return (block_n, block_k), shares(I), shares(O)


def _sum_blocks(block_r: int, xs: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens that programs of the second launch step by, and inputs or outputs of one of them."""
    if interpreting():
        return 16, 16
    # Longer steps spill: float32 has no matrix units, and neither has the square of a long rank.
    if dtype == torch.float32:
        return 16, 32 if block_r > 32 else 64
    return (16 if block_r > 32 else 32) if xs else 64, 64
