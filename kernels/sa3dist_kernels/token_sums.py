"""Sums over tokens, per clip, that gradients of modulations are made of: any number of them in two launches.

    x = right * rows * scale + bias        products = sum_k left * x        plain = sum_k left

with rows of one number a token, and scale and bias of one a channel. The tokens are shared out over programs; a second
launch adds up their shares. Float32 inside, always in one fixed order, without atomics.

Legend: K tokens, E channels, B clips, S shares of the tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sa3dist_kernels.operations import define
from sa3dist_kernels.triton_support import ALIGNMENT, check_triton, launch, loop_end, one_of


class TokenSum(NamedTuple):
    """left_KE, right_KE, scale_E, bias_E, and rows_K in float32 or bool; any shapes of so many elements in this order.

    Where there is no right, rows or scale they are ones; no bias is zeros.
    """

    left_KE: torch.Tensor
    right_KE: torch.Tensor | None = None
    rows_K: torch.Tensor | None = None
    scale_E: torch.Tensor | None = None
    bias_E: torch.Tensor | None = None


class Tiles(NamedTuple):
    """programs of one launch, at most; tokens and channels of a program's step, which is ``depth`` times as long."""

    programs: int = 660
    tokens: int = 8
    depth: int = 4
    channels: int = 128
    warps: int = 4


# Five programs for each of an H100's 132 multiprocessors.
TILES = Tiles()
# Every share is read again.
MOST_SHARES = 48
# Channels of a program of the second launch.
ADDED_CHANNELS = 128


def token_sums(
    sums: Sequence[TokenSum], owner_BK: torch.Tensor | None = None, impl: str = "auto", tiles: Tiles = TILES
) -> list[torch.Tensor]:
    """Products and plain sum of every ``TokenSum``, one after the other, each (B, E) in the format of its left.

    sums       of equal shape and format among the lefts, and of one format among the rights
    owner_BK   bool: the tokens of every clip; None: all are one clip's
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
    shares = min(MOST_SHARES, max(1, tiles.programs // (blocks * count)))
    span = triton.cdiv(triton.cdiv(K, shares), tiles.tokens) * tiles.tokens
    parts = first.new_empty(shares, count, 2, B, E, dtype=torch.float32)
    out = first.new_empty(2 * count, B, E)
    if count > 1:
        # One format for all.
        rows = [value if value is None else value.float() for value in rows]
    owner = parts if owner_BK is None else owner_BK.contiguous()
    # What is not there is not read; something of its kind stands in for it.
    some_right = next((value for value in rights if value is not None), first)
    tensors = {
        "lefts": _filled(lefts, first),
        "rights": _filled(rights, some_right),
        "rows": _filled(rows, parts if count > 1 or rows[0] is None else rows[0]),
        "owner": owner,
        "parts": parts,
    }
    common = {"E": E, "COUNT": count, "SHARES": shares, "CLIPS": B}
    constants = common | {
        "RIGHTS": _bits(rights), "ROWS": _bits(rows), "OWNED": owner_BK is not None, "BLOCK_K": tiles.tokens,
        "DEPTH": tiles.depth, "BLOCK_E": tiles.channels, "num_warps": tiles.warps,
    }  # fmt: skip
    arguments = tensors | {"K": K, "span": loop_end(span)} | constants
    launch(_shares_kernel, (blocks, shares, count * B), arguments, _kept_of(tensors, constants))
    tensors = {"parts": parts, "scales": _filled(scales, parts), "biases": _filled(biases, parts), "out": out}
    constants = common | {"SCALES": _bits(scales), "BIASES": _bits(biases), "BLOCK_E": ADDED_CHANNELS, "num_warps": 4}
    grid = triton.cdiv(E, ADDED_CHANNELS), count * B
    launch(_added_kernel, grid, tensors | constants, _kept_of(tensors, constants))
    return list(out.unbind())


def token_sums_reference(each: TokenSum, owner_BK: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The maths, in float32 or the wider format of left."""
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
    """Which of them are there."""
    return sum(1 << index for index, value in enumerate(values) if value is not None)


def _kept_of(tensors: dict, constants: dict) -> dict | None:
    """Of ``triton_support.launch``: it chooses kernels by constants, formats, and whether memory begins at 16 bytes."""
    flat = [tensor for value in tensors.values() for tensor in (value if isinstance(value, tuple) else (value,))]
    if any(tensor.data_ptr() % ALIGNMENT for tensor in flat):
        return None
    return _kept(tuple(constants.values()), tuple(tensor.dtype for tensor in flat))


@functools.cache
def _kept(*_) -> dict:
    return {}


@triton.jit(do_not_specialize=["K", "span"])
def _shares_kernel(
    lefts, rights, rows, owner, parts, K, span,
    E: tl.constexpr, COUNT: tl.constexpr, SHARES: tl.constexpr, CLIPS: tl.constexpr, RIGHTS: tl.constexpr,
    ROWS: tl.constexpr, OWNED: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A block of channels of one clip, over a span of tokens, into ``parts`` (S, COUNT, 2, B, E)."""
    share, index, clip = tl.program_id(1), tl.program_id(2) // CLIPS, tl.program_id(2) % CLIPS
    e = (tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E))[None, None, :]
    # Loads of one step are under way together. Threads are laid out over the last axis, then the first: each adds up
    # its own along the second.
    steps = tl.arange(0, BLOCK_K)[:, None, None] + tl.arange(0, DEPTH)[None, :, None] * BLOCK_K
    begin = share.to(tl.int64) * span
    end = tl.minimum(K - begin, span).to(tl.int32)
    left, right, row = one_of(lefts, index) + begin * E, one_of(rights, index) + begin * E, one_of(rows, index) + begin
    has_right, has_rows = ((RIGHTS >> index) & 1) != 0, ((ROWS >> index) & 1) != 0
    products = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    plain = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for start in range(0, span, DEPTH * BLOCK_K):
        k = start + steps
        wanted = k < end
        if OWNED:
            wanted = wanted & (tl.load(owner + clip.to(tl.int64) * K + begin + k, mask=wanted, other=0) != 0)
        inside = wanted & (e < E)
        value = tl.load(left + k * E + e, mask=inside, other=0.0).to(tl.float32)
        x = value
        if RIGHTS > 0:
            x = x * tl.load(right + k * E + e, mask=inside & has_right, other=1.0).to(tl.float32)
        if ROWS > 0:
            x = x * tl.load(row + k, mask=wanted & has_rows, other=1).to(tl.float32)
        products += tl.sum(x, axis=1)
        plain += tl.sum(value, axis=1)
    column = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    place = parts + ((share * COUNT + index) * 2 * CLIPS + clip) * E + column
    tl.store(place, tl.sum(products, axis=0), mask=column < E)
    tl.store(place + CLIPS * E, tl.sum(plain, axis=0), mask=column < E)


@triton.jit
def _added_kernel(
    parts, scales, biases, out,
    E: tl.constexpr, COUNT: tl.constexpr, SHARES: tl.constexpr, CLIPS: tl.constexpr, SCALES: tl.constexpr,
    BIASES: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A block of channels of one sum and clip, from all shares, into ``out`` (COUNT, 2, B, E)."""
    index, clip = tl.program_id(1) // CLIPS, tl.program_id(1) % CLIPS
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    place = (index * 2 * CLIPS + clip) * E + e
    products = tl.zeros((BLOCK_E,), tl.float32)
    plain = tl.zeros((BLOCK_E,), tl.float32)
    for share in tl.static_range(SHARES):
        part = parts + share * (COUNT * 2 * CLIPS * E) + place
        products += tl.load(part, mask=inside, other=0.0)
        plain += tl.load(part + CLIPS * E, mask=inside, other=0.0)
    scale = tl.full((BLOCK_E,), 1.0, tl.float32)
    bias = tl.zeros((BLOCK_E,), tl.float32)
    # Their formats may differ.
    for other in tl.static_range(COUNT):
        mine = inside & (index == other)
        if (SCALES >> other) & 1:
            scale *= tl.load(scales[other] + e, mask=mine, other=1.0).to(tl.float32)
        if (BIASES >> other) & 1:
            bias += tl.load(biases[other] + e, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + place, (products * scale + plain * bias).to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + CLIPS * E, plain.to(out.dtype.element_ty), mask=inside)


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
