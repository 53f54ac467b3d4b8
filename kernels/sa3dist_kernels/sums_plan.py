"""How the raw sums of a group of layers are divided among programs: tables, grids and block sizes.

One launch serves several layers. A program looks up its block in a table of ``PROGRAM`` rows, and what it needs to know
of the layer's inputs x (side 0) or outputs dy (side 1) in ``sizes`` (``Side``).

Work is split twice: T and U over channels (``channel_splits``), the sums over tokens (``token_splits``).

Legend: N tokens, O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.formed_spec import aligned
from sa3dist_kernels.triton_support import MAX_REGISTERS, interpreting, rank_block, to_device

# Programs per launch: two per multiprocessor of an H100 (132) in the first kernel; in the second one eight for a single
# layer, and more for several layers, so that the last wave of programs weighs little.
PROGRAMS, SUM_PROGRAMS, GROUP_SUM_PROGRAMS = 264, 1056, 3168
# Channel splits of T and U. Every program of the second kernel adds them up again.
MAX_CHANNEL_SPLITS = 4
# Fewest tokens of a program of the second kernel: its partial sum has to be added.
MIN_TOKEN_SPAN = 512
# Compute capability 8.6, 8.9 and 12.0 have 99 KiB, 8.0 has 163.
SMALL_SHARED_BYTES = 128 << 10

PROGRAM = ("layer", "side", "block", "part")


class Side(NamedTuple):
    """An entry of ``sizes``: one side of a layer. Offsets and strides are in elements.

    size              channels: fan_in or fan_out
    stride            row stride of x or dy
    partner_stride    row stride of dx or z, which x or dy is multiplied with for the magnitude's sum
    channel_span      channels of one split of T or U
    channel_splits    number of these splits
    partials          offset of T or U in the buffer of partial products
    factor_sums       offset of P2, P1 or PM in ``out``
    magnitude_sums    offset of s_h or s_g in ``out``
    token_span        tokens of one split of the sums
    """

    tokens: int
    size: int
    stride: int
    partner_stride: int
    channel_span: int
    channel_splits: int
    partials: int
    factor_sums: int
    magnitude_sums: int
    token_span: int


class LayerShape(NamedTuple):
    """Tokens, fan_in, fan_out, and the row strides of x, dx, dy and z (0 if there is no such tensor)."""

    tokens: int
    fan_in: int
    fan_out: int
    x: int
    dx: int
    dy: int
    z: int


class Launch(NamedTuple):
    """programs: int32 (count, len(PROGRAM)) on the device; constants: of the kernel, with Triton's launch options."""

    programs: torch.Tensor
    constants: dict


@dataclasses.dataclass(frozen=True)
class SumsPlan:
    """The launches of a group.

    sizes         (layers, 2, len(Side._fields)), int64 on the device
    partials      elements of all splits of T and U
    ranks         blocks of the rank
    token_splits  splits of the sums: rows of ``out``
    total         length of a row of ``out``
    counts        its parts: the length of each layer's sums
    compiled      the cache of ``triton_support.launch``
    """

    sizes: torch.Tensor
    partials: int
    ranks: int
    token_splits: int
    total: int
    counts: tuple[int, ...]
    thin: Launch
    sums: Launch
    core: Launch
    compiled: dict = dataclasses.field(default_factory=dict)


# Cached: planning takes the host longer than the launches. Never evicted: CUDA graphs read the tables.
@functools.cache
def plan_of(
    shapes: tuple[LayerShape, ...], R: int, kind: AdapterType, dtype: torch.dtype, precision: str, device: torch.device,
    shared: int,
) -> SumsPlan:  # fmt: skip
    """shared: bytes of shared memory that a program may use."""
    block_r = rank_block(R)
    ranks = triton.cdiv(R, block_r)
    thin_n, thin_warps, thin_k = _thin_blocks(shapes, dtype)
    small = shared < SMALL_SHARED_BYTES
    sums_n, sums_m = _sum_blocks(R, kind.xs, dtype, loads_vectors(shapes), small)
    token_splits = _token_splits(shapes, ranks, kind, sums_n, sums_m)
    channel_splits = _channel_splits(shapes, ranks, thin_n, thin_warps * thin_k)
    sizes, counts, partials = _sizes(shapes, R, kind, channel_splits, thin_warps * thin_k, token_splits, sums_n)
    thin, sums, core = (
        to_device(programs, torch.int32, device)
        for programs in _programs(sizes, kind, thin_n, sums_m, ranks, token_splits)
    )
    inputs, outputs = zip(*sizes, strict=True)
    both = [*inputs, *outputs]
    common = {"R": R, "BLOCK_R": block_r, "num_warps": 4}
    alignments = {"ALIGN_X": _divisor(inputs), "ALIGN_Y": _divisor(outputs)}
    blocks = {"BLOCK_N": sums_n, "LOOP": _loop_bound(side.token_span for side in both)}
    blocks["CHANNEL_SPLITS"] = max(side.channel_splits for side in both)
    types = {"ROWS": kind.rows, "COLS": kind.cols, "XS": kind.xs}
    loops = _loops(block_r, precision)
    # Little shared memory leaves room for few programs on a multiprocessor, whatever their registers.
    sum_blocks = blocks | {"BLOCK_M": sums_m, "maxnreg": MAX_REGISTERS if small else None}
    if block_r <= 32:
        sum_blocks["STAGES"] = 4  # One more, because it fits: 2 to 5 % faster on an H100.
    thin_loop = _loop_bound(side.channel_span for side in both)
    thin_blocks = {"BLOCK_N": thin_n, "WARP_SPLITS": thin_warps, "BLOCK_K": thin_k, "LOOP": thin_loop}
    return SumsPlan(
        sizes=to_device(sizes, torch.int64, device),
        partials=partials,
        ranks=ranks,
        token_splits=token_splits,
        total=sum(counts),
        counts=tuple(counts),
        thin=Launch(thin, common | alignments | loops | thin_blocks),
        sums=Launch(sums, common | alignments | loops | types | sum_blocks),
        core=Launch(core, common | blocks | {"num_stages": 2}),
    )


def _sizes(
    shapes: tuple[LayerShape, ...], R: int, kind: AdapterType, channel_splits: list[tuple[int, int]], thin_step: int,
    token_splits: int, sums_n: int,
) -> tuple[list[tuple[Side, Side]], list[int], int]:  # fmt: skip
    """``sizes``, the length of each layer's sums, and the elements of all splits of T and U."""
    sizes, counts, partials = [], [], 0
    for shape, layer_splits in zip(shapes, channel_splits, strict=True):
        begin, count = offsets(kind, shape.fan_out, shape.fan_in, R)
        sides = (
            (shape.fan_in, shape.x, shape.dx, "lora_A", kind.col_magnitude),
            (shape.fan_out, shape.dy, shape.z, "lora_B", kind.row_magnitude),
        )
        entries = []
        for (size, stride, partner_stride, factor, magnitude), splits in zip(sides, layer_splits, strict=True):
            # -xs types have neither factor; their PM comes first, at 0.
            factor_sums, magnitude_sums = (sum(counts) + begin.get(name, 0) for name in (factor, magnitude))
            entry = Side(
                tokens=shape.tokens,
                size=size,
                stride=stride,
                partner_stride=partner_stride,
                channel_span=triton.cdiv(size, splits * thin_step) * thin_step,
                channel_splits=splits,
                partials=partials,
                factor_sums=factor_sums,
                magnitude_sums=magnitude_sums,
                token_span=triton.cdiv(shape.tokens, token_splits * sums_n) * sums_n,
            )
            entries.append(entry)
            partials += aligned(splits * shape.tokens * R)
        sizes.append(tuple(entries))
        counts.append(count)
    return sizes, counts, partials


def _programs(
    sizes: list[tuple[Side, Side]], kind: AdapterType, thin_n: int, sums_m: int, ranks: int, token_splits: int
) -> tuple[list, list, list]:
    """The program tables of the three kernels."""
    sides = [(layer, side, entry) for layer, entries in enumerate(sizes) for side, entry in enumerate(entries)]
    # Longest programs first; short ones fill the gaps.
    thin = [
        (layer, side, block, split)
        for layer, side, entry in sorted(sides, key=lambda item: -item[2].channel_span)
        for split in range(entry.channel_splits)
        for block in range(triton.cdiv(entry.tokens, thin_n))
    ]
    # -xs types have sums of magnitudes only.
    needed = (kind.cols or not kind.xs, kind.rows or not kind.xs)
    sums = [
        (layer, side, block, split)
        for split in range(token_splits)
        for layer, side, entry in sides
        for block in range(triton.cdiv(entry.size, sums_m) * needed[side])
    ]
    layers = range(len(sizes))
    core = itertools.product(layers, range(ranks), range(ranks), range(token_splits)) if kind.xs else ()
    return thin, sums, list(core)


def offsets(kind: AdapterType, O: int, I: int, R: int) -> tuple[dict[str, int], int]:
    """The offset of each trained tensor's sums in a layer's vector, by its name in a file, and the vector's length."""
    begins, end = {}, 0
    for name, shape in kind.parameter_shapes(O, I, R).items():
        begins[name] = end
        end += math.prod(shape)
    return begins, end


def _divisor(sides: Sequence[Side]) -> int:
    """The largest power of two up to 16 that divides all sizes and strides: how wide loads may be."""
    return math.gcd(16, *(number for side in sides for number in (side.size, side.stride, side.partner_stride)))


def _loop_bound(spans: Iterable[int]) -> int:
    """``LOOP`` of ``formed_tiles.loop_to``: the interpreter needs a constant, elsewhere 0."""
    return max(1, *spans) if interpreting() else 0


def _loops(block_r: int, precision: str) -> dict:
    """Constants of the loops. Fewer stages for a long rank, whose tiles must fit an A100's shared memory."""
    # Stages are set per loop: set for the kernel, they pipeline only the loads of dot operands.
    return {"STAGES": 3 if block_r <= 32 else 2, "PRECISION": precision, "UPCAST": interpreting()}


def loads_vectors(shapes: Sequence[LayerShape]) -> bool:
    """Whether all rows are aligned for wide loads. If not, a large tile's addresses do not fit in registers."""
    return not any(size % 8 for shape in shapes for size in shape[1:])


def _thin_blocks(shapes: tuple[LayerShape, ...], dtype: torch.dtype) -> tuple[int, int, int]:
    """The first kernel's tokens per program, warps that divide the channels, and channels per step of a warp."""
    tokens = max(shape.tokens for shape in shapes)
    if interpreting():
        return 16, 1 if tokens > MIN_TOKEN_SPAN else 2, 16
    vectors, narrow = loads_vectors(shapes), dtype != torch.float32
    if tokens > 1024 and vectors:
        return 64, 1, 128 if narrow else 32
    # 16 tokens are work for one warp, so the four divide the channels.
    return 16, 4, 128 if narrow and vectors else 32


def _channel_splits(shapes: tuple[LayerShape, ...], ranks: int, block_n: int, block_k: int) -> list[tuple[int, int]]:
    """Splits of each layer's sums over I (for T) and over O (for U)."""
    blocks = ranks * sum(triton.cdiv(max(shape.tokens, 1), block_n) for shape in shapes)
    if 2 * blocks >= PROGRAMS:
        return [(1, 1)] * len(shapes)
    channels = sum(shape.fan_in + shape.fan_out for shape in shapes)
    total_splits = max(triton.cdiv(PROGRAMS * len(shapes), blocks), 2 * len(shapes))
    span = triton.cdiv(channels, total_splits * block_k) * block_k

    def splits(size: int) -> int:
        # One or the maximum: each number in between would compile another kernel.
        return MAX_CHANNEL_SPLITS if 2 * size > 3 * span else 1

    return [(splits(shape.fan_in), splits(shape.fan_out)) for shape in shapes]


def _token_splits(shapes: tuple[LayerShape, ...], ranks: int, kind: AdapterType, block_n: int, block_m: int) -> int:
    """Splits of the sums over tokens."""
    tokens, alone = max(shape.tokens for shape in shapes), len(shapes) == 1
    if kind.xs:
        # PM has few programs, so its spans are as short as T and U allow.
        programs, max_programs, min_span = len(shapes) * ranks**2, PROGRAMS // 8 if alone else PROGRAMS, 4 * block_n
    else:
        sides = [size for shape in shapes for size in (shape.fan_in, shape.fan_out)]
        programs = ranks * sum(triton.cdiv(size, block_m) for size in sides)
        max_programs, min_span = SUM_PROGRAMS if alone else GROUP_SUM_PROGRAMS, MIN_TOKEN_SPAN
    return max(1, min(triton.cdiv(max_programs, programs), tokens // min_span))


def _sum_blocks(R: int, xs: bool, dtype: torch.dtype, vectors: bool, small: bool) -> tuple[int, int]:
    """The second kernel's tokens per step, and its channels per program. small: little shared memory."""
    block_r = rank_block(R)
    if interpreting():
        return 16, 16
    # Longer steps spill registers: float32 products, and PM of a long rank, do not run on matrix units.
    if dtype == torch.float32:
        return 16, 32 if block_r > 32 else 64
    if xs:
        return 16 if block_r > 32 else 32, 64
    if small and block_r > 32 and R % block_r:
        # The masks of a partly filled step take registers, too.
        return 32, 32
    return 64 if block_r <= 16 or not small and (vectors or block_r <= 32) else 32, 64
