"""Raw sums: the sums over tokens that an adapted layer's gradients are made of, besides its two library products.

With x (N, I), the output gradient dy (N, O), z = x W'^T, dx = dy W', and the step's factors L' (O, R) and R' (R, I)
(``formed_weights``):

    T = x R'^T        U = dy L'
    P1 = dy^T T (O, R)      P2 = U^T x (R, I)       types that train both factors
    PM = U^T T (R, R)                               -xs types
    s_g = sum_n dy .* z (O)     s_h = sum_n x .* dx (I)      row and column magnitudes

They have the shapes of the trained tensors and take the place of their gradients until ``FormedWeights.finish``. Two
launches serve any number of layers, plus one that adds up partial sums if tokens are split over programs. The order of
sums is fixed, without atomics. One launch per layer would mostly be latency: at 30 s of audio a layer is little work.
Source: spec/formed.md section 2.

Legend: N tokens, O fan_out, I fan_in, R rank, S token splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.sums_kernels import core_sums_kernel, raw_sums_kernel, thin_products_kernel
from sa3dist_kernels.sums_plan import LayerShape, loads_vectors, plan_of
from sa3dist_kernels.triton_support import ALIGNMENT, check_triton, dot_precision, launch, shared_bytes


class LayerPass(NamedTuple):
    """The operands of one layer's raw sums for one micro batch, all of one dtype.

    x, dy              (N, I), (N, O)
    dx, z              shaped like x and dy; dx is read for column magnitudes, z for row magnitudes, else None
    left_OR, right_RI  L' and R' (Q^T diag(h) for -xs types), contiguous
    """

    x: torch.Tensor
    dx: torch.Tensor | None
    dy: torch.Tensor
    z: torch.Tensor | None
    left_OR: torch.Tensor
    right_RI: torch.Tensor


def raw_sums_reference(x, dx, dy, z, left_OR, right_RI, kind: AdapterType) -> torch.Tensor:
    """``raw_sums`` of one layer in torch: products in the operands' dtype, sums in float32 or wider."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    down, up = x @ right_RI.t(), dy @ left_OR
    if kind.xs:
        parts = [up.to(wide).t() @ down.to(wide)]
    else:
        parts = [up.to(wide).t() @ x.to(wide), dy.to(wide).t() @ down.to(wide)]
    if kind.rows:
        parts.append((dy.to(wide) * z.to(wide)).sum(0))
    if kind.cols:
        parts.append((x.to(wide) * dx.to(wide)).sum(0))
    return torch.cat([part.flatten() for part in parts])


def raw_sums(layers: Sequence[LayerPass], kind: AdapterType, *, impl: str = "triton") -> list[torch.Tensor]:
    """One float32 vector per layer that holds all its raw sums, in the order of ``kind.parameter_shapes``.

    layers   of one rank and dtype
    impl     "triton", or "torch" for the reference
    """
    if impl == "torch":
        return [raw_sums_reference(*layer, kind) for layer in layers]
    check_triton(layers[0].dy)
    layers = [LayerPass(*map(_rows_contiguous, layer[:4]), *layer[4:]) for layer in layers]
    shapes = [_shape_of(layer) for layer in layers]
    # Layers with unaligned rows get launches of their own: in a group they would cost all others their wide loads.
    aligned = [index for index, shape in enumerate(shapes) if loads_vectors([shape])]
    sums: dict[int, torch.Tensor] = {}
    for members in (aligned, *([index] for index in range(len(layers)) if index not in aligned)):
        if members:
            group = [layers[index] for index in members], tuple(shapes[index] for index in members)
            sums |= zip(members, _sums_of_group(*group, kind), strict=True)
    return [sums[index] for index in range(len(layers))]


def _shape_of(layer: LayerPass) -> LayerShape:
    strides = (0 if value is None else value.stride(0) for value in layer[:4])
    return LayerShape(len(layer.x), layer.x.shape[1], len(layer.left_OR), *strides)


def _sums_of_group(
    layers: list[LayerPass], shapes: tuple[LayerShape, ...], kind: AdapterType
) -> Sequence[torch.Tensor]:
    xs, dxs, dys, zs, lefts, rights = zip(*layers, strict=True)
    x, rank = xs[0], lefts[0].shape[1]
    plan = plan_of(shapes, rank, kind, x.dtype, dot_precision(), x.device, shared_bytes(x.device))
    cache = plan.compiled if _is_aligned(layers) else None
    partials = x.new_empty(plan.partials, dtype=torch.float32)
    out = x.new_empty(plan.token_splits, plan.total, dtype=torch.float32)
    common = {"sizes": plan.sizes, "partials": partials}
    if len(plan.thin.programs):
        tensors = {"xs": xs, "dys": dys, "rights": rights, "lefts": lefts, "programs": plan.thin.programs}
        grid = len(plan.thin.programs), plan.ranks
        launch(thin_products_kernel, grid, tensors | common | plan.thin.constants, cache)
    common |= {"out": out, "total": plan.total}
    if len(plan.core.programs):
        arguments = {"programs": plan.core.programs} | common | plan.core.constants
        launch(core_sums_kernel, (len(plan.core.programs),), arguments, cache)
    if len(plan.sums.programs):
        # Where a type has no dx or z, another tensor is passed and not read.
        tensors = {"xs": xs, "dxs": dxs if kind.cols else xs, "dys": dys, "zs": zs if kind.rows else dys}
        grid = len(plan.sums.programs), 1 if kind.xs else plan.ranks
        arguments = tensors | {"programs": plan.sums.programs} | common | plan.sums.constants
        launch(raw_sums_kernel, grid, arguments, cache)
    total = out[0] if plan.token_splits == 1 else out.sum(0)
    return total.split(plan.counts)


def _is_aligned(layers: Sequence[LayerPass]) -> bool:
    """Whether the plan's compiled kernels fit: all operands have one dtype and start at multiples of ALIGNMENT.

    Triton also specialises by what the plan depends on, and buffers allocated here are always aligned.
    """
    dtype, addresses = layers[0].x.dtype, 0
    for layer in layers:
        for value in layer:
            if value is not None:
                addresses |= value.data_ptr() if value.dtype is dtype else 1
    return addresses % ALIGNMENT == 0


def _rows_contiguous(value: torch.Tensor | None) -> torch.Tensor | None:
    return value if value is None or value.stride(1) == 1 else value.contiguous()
