"""Sums over the tokens of each clip, for the gradients of modulations: any number of sums in two launches.

    x = right * rows * scale + bias        products = sum_k left * x        plain = sum_k left

with one element of rows per token, and one of scale and bias per channel. Tokens are split over programs; the second
launch adds up their partial sums. Accumulation is float32, in a fixed order, without atomics.

Legend: K tokens, E channels, B clips, S token splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sa3dist_kernels.operations import define
from sa3dist_kernels.triton_support import ALIGNMENT, check_triton, compiled_cache, launch, loop_end, one_of


class TokenSum(NamedTuple):
    """The operands of one pair of sums. Any shapes with these elements in this order; rows_K is float32 or bool.

    None stands for ones in right, rows and scale, and for zeros in bias.
    """

    left_KE: torch.Tensor
    right_KE: torch.Tensor | None = None
    rows_K: torch.Tensor | None = None
    scale_E: torch.Tensor | None = None
    bias_E: torch.Tensor | None = None


class Tiles(NamedTuple):
    """programs: limit per launch; a program's step has ``depth`` x ``tokens`` tokens and ``channels`` channels."""

    programs: int = 660
    tokens: int = 8
    depth: int = 4
    channels: int = 128
    warps: int = 4


# Five programs per multiprocessor of an H100, which has 132.
TILES = Tiles()
# The second launch reads all splits again.
MAX_SPLITS = 48
# Channels of a program of the second launch.
REDUCE_CHANNELS = 128


def token_sums(
    sums: Sequence[TokenSum], owner_BK: torch.Tensor | None = None, impl: str = "auto", tiles: Tiles = TILES
) -> list[torch.Tensor]:
    """Products and plain sum of each ``TokenSum``, in turn; each (B, E), in the dtype of its left.

    sums       all lefts have one shape and dtype, all rights one dtype
    owner_BK   bool: which tokens belong to each clip; None: all tokens belong to one clip
    impl       "triton", "torch", or "auto", which is triton on CUDA
    """
    first = sums[0].left_KE
    if impl == "torch" or (impl == "auto" and not first.is_cuda):
        return [part for each in sums for part in token_sums_reference(each, owner_BK)]
    check_triton(first)
    E, count = first.shape[-1], len(sums)
    K, B = first.numel() // E, 1 if owner_BK is None else len(owner_BK)
    lefts, rights, rows, scales, biases = zip(*sums, strict=True)
    blocks = triton.cdiv(E, tiles.channels)
    splits = min(MAX_SPLITS, max(1, tiles.programs // (blocks * count)))
    span = triton.cdiv(triton.cdiv(K, splits), tiles.tokens) * tiles.tokens
    partials = first.new_empty(splits, count, 2, B, E, dtype=torch.float32)
    out = first.new_empty(2 * count, B, E)
    if count > 1:
        # A tuple of pointers needs one dtype.
        rows = [value if value is None else value.float() for value in rows]
    owner = partials if owner_BK is None else owner_BK.contiguous()
    # The kernels do not read missing tensors; a tensor of the right dtype is passed instead.
    any_right = next((value for value in rights if value is not None), first)
    tensors = {
        "lefts": _filled(lefts, first),
        "rights": _filled(rights, any_right),
        "rows": _filled(rows, partials if count > 1 or rows[0] is None else rows[0]),
        "owner": owner,
        "partials": partials,
    }
    common = {"E": E, "COUNT": count, "SPLITS": splits, "CLIPS": B}
    constants = common | {
        "RIGHTS": _bits(rights), "ROWS": _bits(rows), "OWNED": owner_BK is not None, "BLOCK_K": tiles.tokens,
        "DEPTH": tiles.depth, "BLOCK_E": tiles.channels, "num_warps": tiles.warps,
    }  # fmt: skip
    arguments = tensors | {"K": K, "span": loop_end(span)} | constants
    launch(_partial_sums_kernel, (blocks, splits, count * B), arguments, _cache_for(tensors, constants))
    scales_and_biases = {"scales": _filled(scales, partials), "biases": _filled(biases, partials)}
    tensors = {"partials": partials, **scales_and_biases, "out": out}
    constants = common | {"SCALES": _bits(scales), "BIASES": _bits(biases), "BLOCK_E": REDUCE_CHANNELS, "num_warps": 4}
    grid = triton.cdiv(E, REDUCE_CHANNELS), count * B
    launch(_reduce_kernel, grid, tensors | constants, _cache_for(tensors, constants))
    return list(out.unbind())


def token_sums_reference(each: TokenSum, owner_BK: torch.Tensor | None = None) -> list[torch.Tensor]:
    """``token_sums`` of one ``TokenSum`` in torch, in float32 or the wider dtype of left."""
    left = each.left_KE
    E, wide = left.shape[-1], torch.promote_types(left.dtype, torch.float32)
    x_KE = torch.ones_like(left, dtype=wide) if each.right_KE is None else each.right_KE.to(wide)
    left_KE, x_KE = left.to(wide).reshape(-1, E), x_KE.reshape(-1, E)
    if each.rows_K is not None:
        x_KE = x_KE * each.rows_K.to(wide).reshape(-1, 1)
    if each.scale_E is not None:
        x_KE = x_KE * each.scale_E.to(wide).reshape(E)
    if each.bias_E is not None:
        x_KE = x_KE + each.bias_E.to(wide).reshape(E)
    owner_BK = left_KE.new_ones(1, len(left_KE)) if owner_BK is None else owner_BK.to(wide)
    return [(owner_BK @ (left_KE * x_KE)).to(left.dtype), (owner_BK @ left_KE).to(left.dtype)]


def _filled(values: Sequence[torch.Tensor | None], stand_in: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(stand_in if value is None else value.contiguous() for value in values)


def _bits(values: Sequence[torch.Tensor | None]) -> int:
    """A bit mask of the values that are not None."""
    return sum(1 << index for index, value in enumerate(values) if value is not None)


def _cache_for(tensors: dict, constants: dict) -> dict | None:
    """The ``cache`` of ``launch``: one per constants and dtypes, none for tensors that are not aligned."""
    flat = [tensor for value in tensors.values() for tensor in (value if isinstance(value, tuple) else (value,))]
    if any(tensor.data_ptr() % ALIGNMENT for tensor in flat):
        return None
    return compiled_cache("token_sums", tuple(constants.values()), tuple(tensor.dtype for tensor in flat))


@triton.jit(do_not_specialize=["K", "span"])
def _partial_sums_kernel(
    lefts, rights, rows, owner, partials, K, span,
    E: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr, CLIPS: tl.constexpr, RIGHTS: tl.constexpr,
    ROWS: tl.constexpr, OWNED: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A block of channels of one clip, summed over a span of tokens; to ``partials`` (S, COUNT, 2, B, E)."""
    split, index, clip = tl.program_id(1), tl.program_id(2) // CLIPS, tl.program_id(2) % CLIPS
    e = (tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E))[None, None, :]
    # All loads of a step are in flight together. Threads are laid out over the last axis, then the first, so each
    # thread sums its own elements along the second.
    steps = tl.arange(0, BLOCK_K)[:, None, None] + tl.arange(0, DEPTH)[None, :, None] * BLOCK_K
    begin = split.to(tl.int64) * span
    end = tl.minimum(K - begin, span).to(tl.int32)
    left, right, row = one_of(lefts, index) + begin * E, one_of(rights, index) + begin * E, one_of(rows, index) + begin
    has_right, has_rows = ((RIGHTS >> index) & 1) != 0, ((ROWS >> index) & 1) != 0
    products = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    plain = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for start in range(0, span, DEPTH * BLOCK_K):
        k = start + steps
        selected = k < end
        if OWNED:
            selected = selected & (tl.load(owner + clip.to(tl.int64) * K + begin + k, mask=selected, other=0) != 0)
        inside = selected & (e < E)
        value = tl.load(left + k * E + e, mask=inside, other=0.0).to(tl.float32)
        x = value
        if RIGHTS > 0:
            x = x * tl.load(right + k * E + e, mask=inside & has_right, other=1.0).to(tl.float32)
        if ROWS > 0:
            x = x * tl.load(row + k, mask=selected & has_rows, other=1).to(tl.float32)
        products += tl.sum(x, axis=1)
        plain += tl.sum(value, axis=1)
    column = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    pointers = partials + ((split * COUNT + index) * 2 * CLIPS + clip) * E + column
    tl.store(pointers, tl.sum(products, axis=0), mask=column < E)
    tl.store(pointers + CLIPS * E, tl.sum(plain, axis=0), mask=column < E)


@triton.jit
def _reduce_kernel(
    partials, scales, biases, out,
    E: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr, CLIPS: tl.constexpr, SCALES: tl.constexpr,
    BIASES: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A block of channels of one sum and clip, added up over all splits; to ``out`` (COUNT, 2, B, E)."""
    index, clip = tl.program_id(1) // CLIPS, tl.program_id(1) % CLIPS
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    offsets = (index * 2 * CLIPS + clip) * E + e
    products = tl.zeros((BLOCK_E,), tl.float32)
    plain = tl.zeros((BLOCK_E,), tl.float32)
    for split in tl.static_range(SPLITS):
        part = partials + split * (COUNT * 2 * CLIPS * E) + offsets
        products += tl.load(part, mask=inside, other=0.0)
        plain += tl.load(part + CLIPS * E, mask=inside, other=0.0)
    scale = tl.full((BLOCK_E,), 1.0, tl.float32)
    bias = tl.zeros((BLOCK_E,), tl.float32)
    # A loop, not ``one_of``: dtypes may differ.
    for other in tl.static_range(COUNT):
        mask = inside & (index == other)
        if (SCALES >> other) & 1:
            scale *= tl.load(scales[other] + e, mask=mask, other=1.0).to(tl.float32)
        if (BIASES >> other) & 1:
            bias += tl.load(biases[other] + e, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, (products * scale + plain * bias).to(out.dtype.element_ty), mask=inside)
    tl.store(out + offsets + CLIPS * E, plain.to(out.dtype.element_ty), mask=inside)


def _token_sums(lefts, rights, rows, scales, biases, owner_BK, impl: str) -> list[torch.Tensor]:
    return token_sums(
        [TokenSum(*each) for each in zip(lefts, rights, rows, scales, biases, strict=True)], owner_BK, impl
    )


def _token_sums_shapes(lefts, rights, rows, scales, biases, owner_BK, impl: str) -> list[torch.Tensor]:
    clips = 1 if owner_BK is None else owner_BK.shape[0]
    return [left.new_empty(clips, left.shape[-1]) for left in lefts for _ in range(2)]


define(
    "token_sums(Tensor[] lefts, Tensor?[] rights, Tensor?[] rows, Tensor?[] scales, Tensor?[] biases, Tensor? owner, "
    "str impl) -> Tensor[]",
    _token_sums,
    _token_sums_shapes,
)
