"""The sums over tokens that layers' gradients are made of, beside their two library products.

With x (N, I), dy (N, O) its output's gradient, z = x W'^T, dx = dy W', and the factors L' (O, R), R' (R, I) of one
optimiser step (``formed_weights``):

    T = x R'^T        U = dy L'
    P1 = dy^T T (O, R)      P2 = U^T x (R, I)       types that train both factors
    PM = U^T T (R, R)                               -xs types
    s_g = sum_n dy .* z (O)     s_h = sum_n x .* dx (I)      row and column magnitudes

They have the shapes of the trained tensors and stand for their gradients until ``FormedWeights.finish``. Two launches
for any number of layers and, where the tokens are shared out over programs, a third that adds up; always in one fixed
order, without atomics. At 30 s a layer is little work: one launch for each of a block's layers was mostly waiting.
Source: spec/formed.md section 2.

Legend: N tokens, O fan_out, I fan_in, R rank, S shares of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.sums_kernels import core_sums_kernel, raw_sums_kernel, thin_products_kernel
from sa3dist_kernels.sums_plan import LayerShape, loads_vectors, plan_of
from sa3dist_kernels.triton_support import ALIGNMENT, check_triton, dot_precision, launch


class LayerPass(NamedTuple):
    """What the sums of one layer and micro batch are made of.

    x, dy             (N, I), (N, O); dx, z likewise, needed for column and for row types only. One format
    left_OR, right_RI L' and R' (or Q^T diag(h) of -xs types), contiguous, in that format
    """

    x: torch.Tensor
    dx: torch.Tensor | None
    dy: torch.Tensor
    z: torch.Tensor | None
    left_OR: torch.Tensor
    right_RI: torch.Tensor


def raw_sums_reference(x, dx, dy, z, left_OR, right_RI, kind: AdapterType) -> torch.Tensor:
    """The maths; products in the operands' format, sums in float32 or the wider format of the operands."""
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
    """All sums of each layer and micro batch in one float32 vector, in the order of ``kind.parameter_shapes``.

    layers   all of one rank and format
    impl     "triton", or "torch" for the reference
    """
    if impl == "torch":
        return [raw_sums_reference(*layer, kind) for layer in layers]
    check_triton(layers[0].dy)
    layers = [LayerPass(*map(_rows_contiguous, layer[:4]), *layer[4:]) for layer in layers]
    shapes = [_shape_of(layer) for layer in layers]
    # One layer whose rows begin anywhere would cost all others their long vectors.
    together = [index for index, shape in enumerate(shapes) if loads_vectors([shape])]
    found: dict[int, torch.Tensor] = {}
    for members in (together, *([index] for index in range(len(layers)) if index not in together)):
        if members:
            sums = _of_group([layers[index] for index in members], tuple(shapes[index] for index in members), kind)
            found |= zip(members, sums, strict=True)
    return [found[index] for index in range(len(layers))]


def _shape_of(layer: LayerPass) -> LayerShape:
    strides = (0 if value is None else value.stride(0) for value in layer[:4])
    return LayerShape(len(layer.x), layer.x.shape[1], len(layer.left_OR), *strides)


def _of_group(layers: list[LayerPass], shapes: tuple[LayerShape, ...], kind: AdapterType) -> Sequence[torch.Tensor]:
    xs, dxs, dys, zs, lefts, rights = zip(*layers, strict=True)
    x, rank = xs[0], lefts[0].shape[1]
    plan = plan_of(shapes, rank, kind, x.dtype, dot_precision(), x.device)
    kept = plan.kept if _as_planned(layers) else None
    parts = x.new_empty(plan.parts, dtype=torch.float32)
    out = x.new_empty(plan.splits, plan.total, dtype=torch.float32)
    common = {"sizes": plan.sizes, "parts": parts}
    if len(plan.thin.programs):
        tensors = {"xs": xs, "dys": dys, "rights": rights, "lefts": lefts, "programs": plan.thin.programs}
        grid = len(plan.thin.programs), plan.ranks
        launch(thin_products_kernel, grid, tensors | common | plan.thin.constants, kept)
    common |= {"out": out, "total": plan.total}
    if len(plan.core.programs):
        arguments = {"programs": plan.core.programs} | common | plan.core.constants
        launch(core_sums_kernel, (len(plan.core.programs),), arguments, kept)
    if len(plan.sums.programs):
        # Tensors of the type's own only; the others stand in for what is not read.
        tensors = {"xs": xs, "dxs": dxs if kind.cols else xs, "dys": dys, "zs": zs if kind.rows else dys}
        grid = len(plan.sums.programs), 1 if kind.xs else plan.ranks
        arguments = tensors | {"programs": plan.sums.programs} | common | plan.sums.constants
        launch(raw_sums_kernel, grid, arguments, kept)
    whole = out[0] if plan.splits == 1 else out.sum(0)
    return whole.split(plan.counts)


def _as_planned(layers: Sequence[LayerPass]) -> bool:
    """Whether Triton would take the same kernels for all operands like these with one plan.

    It chooses by formats, which are one here, by what the plan depends on, and by whether memory begins at 16 bytes.
    What is allocated here always does.
    """
    dtype, places = layers[0].x.dtype, 0
    for layer in layers:
        for value in layer:
            if value is not None:
                places |= value.data_ptr() if value.dtype is dtype else 1
    return places % ALIGNMENT == 0


def _rows_contiguous(value: torch.Tensor | None) -> torch.Tensor | None:
    return value if value is None or value.stride(1) == 1 else value.contiguous()
