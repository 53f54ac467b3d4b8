"""How the sums over tokens of a group of layers are shared out over programs: tables, grids, block sizes.

One launch serves several layers. A program finds in a table (``PROGRAM``) which block of which layer is its own, and in
``sizes`` (``Side``) what it needs to know of that layer's inputs x (side 0) or outputs dy (side 1).

Legend: N tokens, O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.triton_support import interpreting, rank_block, sent

# Programs of one launch for a layer alone: two, and in the second kernel eight, for each of an H100's 132
# multiprocessors. For several layers there are rounds of them in the second kernel, so that the last one weighs little.
PROGRAMS, SUM_PROGRAMS, GROUP_SUM_PROGRAMS = 264, 1056, 3168
# Shares of T and U: every program of the second kernel adds them up again.
MOST_SHARES = 4
# Tokens that are worth a program of their own in the second kernel, and an addition of its result.
LEAST_SPAN = 512
# Elements by which a layer's shares of T and U begin.
ALIGNED = 16

PROGRAM = ("layer", "side", "block", "part")


class Side(NamedTuple):
    """An entry of ``sizes``.

    made_stride    of dx or z                        span     channels of a share of T or U, which begin at ``parts``
    matrix, gains  where the layer's sums begin      token_span   tokens of one split
    """

    tokens: int
    size: int
    stride: int
    made_stride: int
    span: int
    shares: int
    parts: int
    matrix: int
    gains: int
    token_span: int


class LayerShape(NamedTuple):
    """Tokens, fan_in, fan_out, and the row strides of x, dx, dy and z (0 where there is none)."""

    tokens: int
    fan_in: int
    fan_out: int
    x: int
    dx: int
    dy: int
    z: int


class Launch(NamedTuple):
    """programs (number, len(PROGRAM)), int32 on the device; constants and options of the kernel."""

    programs: torch.Tensor
    constants: dict


@dataclasses.dataclass(frozen=True)
class SumsPlan:
    """What the launches of a group take.

    sizes          (layers, 2, len(Side._fields)), int64 on the device
    parts          elements of all shares of T and U      ranks    blocks of the rank
    splits, total  shares of the sums, and the length of one: layer after layer, each as long as ``counts`` says
    kept           of ``triton_support.launch``
    """

    sizes: torch.Tensor
    parts: int
    ranks: int
    splits: int
    total: int
    counts: tuple[int, ...]
    thin: Launch
    sums: Launch
    core: Launch
    kept: dict = dataclasses.field(default_factory=dict)


# Found once for a shape: it would take the host longer than the launches. For good: recorded graphs read the tables.
@functools.cache
def plan_of(
    shapes: tuple[LayerShape, ...], R: int, kind: AdapterType, dtype: torch.dtype, precision: str, device: torch.device
) -> SumsPlan:
    block_r = rank_block(R)
    ranks = triton.cdiv(R, block_r)
    thin_n, thin_warps, thin_k = _thin_blocks(shapes, dtype)
    sums_n, sums_m = _sum_blocks(block_r, kind.xs, dtype, loads_vectors(shapes))
    splits = _splits(shapes, ranks, kind, sums_n, sums_m)
    shares = _shares(shapes, ranks, thin_n, thin_warps * thin_k)
    sizes, counts, parts = _sizes(shapes, R, kind, shares, thin_warps * thin_k, splits, sums_n)
    thin, sums, core = (
        sent(programs, torch.int32, device) for programs in _programs(sizes, kind, thin_n, sums_m, ranks, splits)
    )
    # By side, its layers'.
    sides = list(zip(*sizes, strict=True))
    spans, token_spans = zip(*((side.span, side.token_span) for of_layer in sizes for side in of_layer), strict=True)
    common = {"R": R, "BLOCK_R": block_r, "num_warps": 4}
    wide = {name: _multiple(of_side) for name, of_side in zip(("WIDE_X", "WIDE_Y"), sides, strict=True)}
    blocks = {"BLOCK_N": sums_n, "LOOP": _loop_to(token_spans)}
    blocks["SHARES"] = max(side.shares for of_layer in sizes for side in of_layer)
    types = {"ROWS": kind.rows, "COLS": kind.cols, "XS": kind.xs}
    loops = _loops(block_r, precision)
    thin_blocks = {"BLOCK_N": thin_n, "SPLITS": thin_warps, "BLOCK_K": thin_k, "LOOP": _loop_to(spans)}
    return SumsPlan(
        sizes=sent(sizes, torch.int64, device),
        parts=parts,
        ranks=ranks,
        splits=splits,
        total=sum(counts),
        counts=tuple(counts),
        thin=Launch(thin, common | wide | loops | thin_blocks),
        sums=Launch(sums, common | wide | loops | types | blocks | {"BLOCK_M": sums_m, **_sum_loops(block_r)}),
        core=Launch(core, common | blocks | {"num_stages": 2}),
    )


def _sizes(
    shapes: tuple[LayerShape, ...],
    R: int,
    kind: AdapterType,
    shares: list[tuple[int, int]],
    thin_step: int,
    splits: int,
    sums_n: int,
) -> tuple[list[tuple[Side, Side]], list[int], int]:
    """``sizes``, the length of each layer's sums, and the elements of all shares of T and U."""
    sizes, counts, parts = [], [], 0
    for shape, of_layer in zip(shapes, shares, strict=True):
        begin, count = offsets(kind, shape.fan_out, shape.fan_in, R)
        sides = (
            (shape.fan_in, shape.x, shape.dx, "lora_A", kind.col_magnitude),
            (shape.fan_out, shape.dy, shape.z, "lora_B", kind.row_magnitude),
        )
        entries = []
        for (size, stride, made_stride, factor, magnitude), share_count in zip(sides, of_layer, strict=True):
            # The one square of an -xs type comes first.
            places = (sum(counts) + begin.get(name, 0) for name in (factor, magnitude))
            span = up_to(triton.cdiv(size, share_count), thin_step)
            token_span = up_to(triton.cdiv(shape.tokens, splits), sums_n)
            entries.append(Side(shape.tokens, size, stride, made_stride, span, share_count, parts, *places, token_span))
            parts += up_to(share_count * shape.tokens * R, ALIGNED)
        sizes.append(tuple(entries))
        counts.append(count)
    return sizes, counts, parts


def _programs(
    sizes: list[tuple[Side, Side]], kind: AdapterType, thin_n: int, sums_m: int, ranks: int, splits: int
) -> tuple[list, list, list]:
    """Of the three kernels."""
    sides = [(layer, side, entry) for layer, of_layer in enumerate(sizes) for side, entry in enumerate(of_layer)]
    # What takes longest comes first, and the rest fills the gaps.
    thin = [
        (layer, side, block, share)
        for layer, side, entry in sorted(sides, key=lambda item: -item[2].span)
        for share in range(entry.shares)
        for block in range(triton.cdiv(entry.tokens, thin_n))
    ]
    # Of an -xs type there are magnitudes alone.
    wanted = (kind.cols or not kind.xs, kind.rows or not kind.xs)
    sums = [
        (layer, side, block, split)
        for split in range(splits)
        for layer, side, entry in sides
        for block in range(triton.cdiv(entry.size, sums_m) * wanted[side])
    ]
    squares = itertools.product(range(len(sizes)), range(ranks), range(ranks), range(splits)) if kind.xs else ()
    return thin, sums, list(squares)


def offsets(kind: AdapterType, O: int, I: int, R: int) -> tuple[dict[str, int], int]:
    """Where each trained tensor's sums begin in a layer's vector, by its name in a file, and the vector's length."""
    begins, end = {}, 0
    for name, shape in kind.parameter_shapes(O, I, R).items():
        begins[name] = end
        end += math.prod(shape)
    return begins, end


def up_to(count: int, step: int) -> int:
    """``count``, or the next multiple of ``step``."""
    return -(-count // step) * step


def _multiple(sides: Sequence[Side]) -> int:
    """The largest power of two up to 16 that divides the sizes and strides: what vectors can be loaded."""
    return math.gcd(16, *(number for side in sides for number in (side.size, side.stride, side.made_stride)))


def _loop_to(spans: Sequence[int]) -> int:
    """How far the interpreter loops, to a constant only; elsewhere 0: to a program's own span."""
    return max(1, *spans) if interpreting() else 0


def _loops(block_r: int, precision: str) -> dict:
    """Constants of the loops. Tiles of a long rank must fit the shared memory of an A100 too."""
    # Said of the loops: else only what enters a product is loaded ahead.
    return {"STAGES": 3 if block_r <= 32 else 2, "PRECISION": precision, "UPCAST": interpreting()}


def _sum_loops(block_r: int) -> dict:
    """What is otherwise in the second kernel: a step more under way, 2 to 5 % faster on an H100, where it fits."""
    return {"STAGES": 4} if block_r <= 32 else {}


def loads_vectors(shapes: Sequence[LayerShape]) -> bool:
    """Whether all rows begin at long vectors. If not, the addresses of a large tile do not fit the registers."""
    return not any(size % 8 for shape in shapes for size in shape[1:])


def _thin_blocks(shapes: tuple[LayerShape, ...], dtype: torch.dtype) -> tuple[int, int, int]:
    """Of a program of the first kernel: its tokens, warps that share out the channels, and channels a warp steps by."""
    tokens = max(shape.tokens for shape in shapes)
    if interpreting():
        return 16, 1 if tokens > LEAST_SPAN else 2, 16
    vectors, narrow = loads_vectors(shapes), dtype != torch.float32
    if tokens > 1024 and vectors:
        return 64, 1, 128 if narrow else 32
    # So few tokens as 16 are work for one warp.
    return 16, 4, 128 if narrow and vectors else 32


def _shares(shapes: tuple[LayerShape, ...], ranks: int, block_n: int, block_k: int) -> list[tuple[int, int]]:
    """Shares of the first kernel's sums over I and over O, by layer."""
    blocks = ranks * sum(triton.cdiv(max(shape.tokens, 1), block_n) for shape in shapes)
    if 2 * blocks >= PROGRAMS:
        return [(1, 1)] * len(shapes)
    channels = sum(shape.fan_in + shape.fan_out for shape in shapes)
    each = max(triton.cdiv(PROGRAMS * len(shapes), blocks), 2 * len(shapes))
    span = up_to(triton.cdiv(channels, each), block_k)

    def shares(side: int) -> int:
        # One or the most: any number between would be a kernel of its own.
        return MOST_SHARES if 2 * side > 3 * span else 1

    return [(shares(shape.fan_in), shares(shape.fan_out)) for shape in shapes]


def _splits(shapes: tuple[LayerShape, ...], ranks: int, kind: AdapterType, block_n: int, block_m: int) -> int:
    """Shares of the sums over tokens."""
    tokens, alone = max(shape.tokens for shape in shapes), len(shapes) == 1
    if kind.xs:
        # PM has few programs of its own: its spans are as short as T and U allow.
        programs, most, least = len(shapes) * ranks * ranks, PROGRAMS // 8 if alone else PROGRAMS, 4 * block_n
    else:
        sides = [size for shape in shapes for size in (shape.fan_in, shape.fan_out)]
        programs = ranks * sum(triton.cdiv(size, block_m) for size in sides)
        most, least = SUM_PROGRAMS if alone else GROUP_SUM_PROGRAMS, LEAST_SPAN
    return max(1, min(triton.cdiv(most, programs), tokens // least))


def _sum_blocks(block_r: int, xs: bool, dtype: torch.dtype, vectors: bool) -> tuple[int, int]:
    """Tokens that programs of the second launch step by, and inputs or outputs of one of them."""
    if interpreting():
        return 16, 16
    # Longer steps spill: float32 has no matrix units, and neither has the square of a long rank.
    if dtype == torch.float32:
        return 16, 32 if block_r > 32 else 64
    return (16 if block_r > 32 else 32) if xs else 64 if vectors or block_r <= 32 else 32, 64
