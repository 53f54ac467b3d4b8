"""An adapted linear layer, y = W' x + bias, evaluated and differentiated without forming W' or its gradient.

With W0 the frozen weight, s the scale, L and R the two factors of the update and V = W0 + s L R,

    W' = diag(g) V diag(h)      g = row magnitude / (row norms of V + eps)                 or 1
                                h = column magnitude / (column norms of diag(g) V + eps)   or 1

    z = h * x      p = W0 z + s L (R z)      y = g * p + bias

The norms, made from thin products with W0, are differentiated as the reference does (``weight_norms``). A row-scaled
layer costs two matrix products, like a frozen one: the rows of the right factor ride along as extra tokens of
``x @ W0^T`` and give the cross term W0 R^T of the row norms; in the backward pass the columns of diag(k) L ride along
in ``dp @ W0``. On a CPU that beats separate thin products: 65 ms against 73, frozen 60 (1024 to 8192, N 192, R 16).

Layouts: N tokens, O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.dispatch import IMPLEMENTATIONS, runs_fused
from sa3dist_kernels.frozen_products import compute_dtype, no_autocast, product_dtype, times, times_transposed
from sa3dist_kernels.weight_norms import (
    EPS,
    ColScaling,
    FrozenConstants,
    Layer,
    RowScaling,
    col_backward,
    col_scaling,
    factors,
    frozen_constants,
    row_backward,
    row_cross,
    row_scaling,
    row_slope,
)


def effective_weight_reference(
    weight: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    kind: AdapterType,
    scale: float,
    frozen: FrozenConstants | None = None,
) -> torch.Tensor:
    """W' itself, in the shape of ``weight`` and the wider dtype of weight and parameters; autograd goes through it.

    The oracle of the factored form, and what a merge writes. ``frozen`` is needed for the bases of -xs types only.
    """
    dtype = torch.promote_types(weight.dtype, next(iter(params.values())).dtype)
    if kind.xs:
        update = frozen.left_OR.to(dtype) @ params["M_xs"] @ frozen.right_IR.to(dtype).t()
    else:
        update = params["lora_B"] @ params["lora_A"]
    merged = weight.flatten(1).to(dtype) + scale * update
    if kind.rows:
        norms = torch.linalg.vector_norm(merged, dim=1)
        merged = (params[kind.row_magnitude] / (norms + EPS))[:, None] * merged
    if kind.cols:
        norms = torch.linalg.vector_norm(merged, dim=0)
        merged = merged * (params[kind.col_magnitude] / (norms + EPS))
    return merged.view(weight.shape)


def _rides_along(kind: AdapterType) -> bool:
    """Whether W0 R^T comes out of the main product: not where columns are scaled before it or frozen bases give it."""
    return kind.rows and not kind.cols and not kind.xs


def _scaled(values_NX, gain_X, dtype):
    """``values * gain`` in ``dtype``, in one pass; a gain of None is one."""
    if gain_X is None:
        return values_NX.to(dtype)
    return torch.mul(values_NX, gain_X, out=torch.empty_like(values_NX, dtype=dtype))


def _with_room(values_NX, dtype, extra_rows: int):
    """An uninitialised (N + extra_rows, X) buffer: the tokens to multiply with the weight, and what rides along."""
    return values_NX.new_empty(values_NX.shape[0] + extra_rows, values_NX.shape[1], dtype=dtype)


class _AdaptedLinear(torch.autograd.Function):
    """Torch path. Gradients reach x (N, I) and the trained tensors; ``layer``, ``bias_O`` and ``weight`` are frozen.

    weight  W0 in the shape its owner has it. Kept instead of ``layer.weight_OI``, which is a view of its values now: an
            owner that gathers W0 for each pass and drops it in between (ZeRO-3) must not find it held until backward.
    """

    @staticmethod
    def forward(ctx, x, core, left, magnitude_O, magnitude_I, bias_O, layer, weight):
        with no_autocast(x.device):
            y, *kept = _forward(layer, x, core, left, magnitude_O, magnitude_I, bias_O)
        p, down, rows, cols = kept
        ctx.layer, ctx.weight = dataclasses.replace(layer, weight_OI=None), weight
        ctx.has_rows, ctx.has_cols = rows is not None, cols is not None
        ctx.save_for_backward(x, core, left, p, down, *_tensors(rows), *_tensors(cols))
        # A view: where the result itself was written in place, torch 2.11's compiler silently gives no gradient.
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, core, left, p, down, *stats = ctx.saved_tensors
        rows = RowScaling(*stats[:3]) if ctx.has_rows else None
        cols = ColScaling(*stats[-4:]) if ctx.has_cols else None
        needs_x, *needs_trained = ctx.needs_input_grad[:5]
        layer = dataclasses.replace(ctx.layer, weight_OI=ctx.weight.detach().flatten(1))
        with no_autocast(grad.device):
            grads = _backward(layer, x, core, left, p, down, rows, cols, grad, needs_x, any(needs_trained))
        return *grads, None, None, None


def _tensors(scaling: RowScaling | ColScaling | None) -> tuple[torch.Tensor, ...]:
    return () if scaling is None else tuple(scaling)


def _forward(layer: Layer, x, core, left, magnitude_O, magnitude_I, bias_O):
    """y and what the backward pass needs: p (with row scaling only), R z, and both scalings.

    p is kept although y holds it too: (y - bias) / g loses it where g is small.
    """
    L, R = factors(layer, core, left)
    kind, tokens = layer.kind, x.shape[0]
    rows = cols = None
    if kind.rows and not _rides_along(kind):
        rows = row_scaling(layer, L, R, magnitude_O, row_cross(layer, core, R))
    if kind.cols:
        cols = col_scaling(layer, L, R, magnitude_I, rows)
    if _rides_along(kind):
        stacked = _with_room(x, layer.product, R.shape[0])
        stacked[:tokens], stacked[tokens:] = x, R
        z, product = stacked[:tokens], times_transposed(stacked, layer.weight_OI)
        p, cross = product[:tokens], product[tokens:].t().to(layer.statistic)
        rows = row_scaling(layer, L, R, magnitude_O, cross)
    else:
        z = _scaled(x, None if cols is None else cols.gain_I, layer.product)
        p = times_transposed(z, layer.weight_OI)
    down = z @ R.t().to(layer.product)
    # Contiguous: with O as the slow axis of the thin factor this product takes 1.5 times as long on a CPU.
    p.addmm_(down, L.t().contiguous().to(layer.product), alpha=layer.scale)
    if rows is None:
        return (p if bias_O is None else p.add_(bias_O)).to(x.dtype), None, down, rows, cols
    y = torch.empty_like(p, dtype=x.dtype)
    if bias_O is None:
        torch.mul(p, rows.gain_O, out=y)
    else:
        torch.addcmul(bias_O.to(layer.statistic), p, rows.gain_O, out=y)
    return y, p, down, rows, cols


def _backward(layer: Layer, x, core, left, p, down, rows, cols, grad, needs_x: bool, needs_trained: bool):
    """Gradients of (x, core, left, row magnitude, column magnitude); None for what nobody asked for."""
    L, R = factors(layer, core, left)
    kind, tokens = layer.kind, x.shape[0]
    grad_gain_O = slope_O = sloped_cross = grad_row_magnitude = grad_col_magnitude = None
    rides = _rides_along(kind) and needs_trained
    if rows is None:
        stacked = grad_p = grad.to(layer.product)
    else:
        stacked = _with_room(grad, layer.product, R.shape[0] if rides else 0)
        grad_p = stacked[:tokens]
        if needs_trained:
            # The buffer holds the products first: a temporary of its own costs more than the products on a CPU.
            grad_gain_O = torch.mul(grad, p, out=grad_p).sum(0, dtype=layer.statistic)
        torch.mul(grad, rows.gain_O, out=grad_p)
    if rides:
        slope_O = row_slope(rows, grad_gain_O)
        stacked[tokens:] = (slope_O[:, None] * L).t()
    up = grad_p @ L.to(layer.product)
    if needs_x or cols is not None:
        product = times(stacked, layer.weight_OI)
        grad_z, sloped_cross = product[:tokens], product[tokens:].to(layer.statistic) if rides else None
        grad_z.addmm_(up, R.to(layer.product), alpha=layer.scale)
    grad_x = None
    if needs_x:
        grad_x = _scaled(grad_z, None if cols is None else cols.gain_I, x.dtype)
    if not needs_trained:
        return grad_x, None, None, None, None

    grad_right = layer.scale * (up.t() @ x.to(layer.product)).to(layer.statistic)
    grad_left = None if kind.xs else layer.scale * (grad_p.t() @ down).to(layer.statistic)
    if cols is not None:
        grad_right *= cols.gain_I
        grad_gain_I = (grad_z * x).sum(0, dtype=layer.statistic)
        grad_col_magnitude = grad_gain_I / (cols.norms_I + EPS)
        norm_left, norm_right, norm_gain = col_backward(layer, L, R, rows, cols, grad_gain_I)
        grad_right += norm_right
        grad_left = grad_left if norm_left is None else grad_left + norm_left
        grad_gain_O = grad_gain_O if norm_gain is None else grad_gain_O + norm_gain
    grad_core = grad_right @ layer.constant("right_IR") if kind.xs else grad_right
    if rows is not None:
        grad_row_magnitude = grad_gain_O / (rows.norms_O + EPS)
        slope_O = row_slope(rows, grad_gain_O) if slope_O is None else slope_O
        norm_left, norm_core = row_backward(layer, L, R, rows, slope_O, sloped_cross)
        grad_core = grad_core + norm_core
        grad_left = grad_left if norm_left is None else grad_left + norm_left
    return grad_x, grad_core, grad_left, grad_row_magnitude, grad_col_magnitude


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    params: Mapping[str, torch.Tensor],
    kind: AdapterType,
    scale: float,
    *,
    frozen: FrozenConstants | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """``x @ W'.T + bias`` for any of the nine adapter types.

    x       (..., I). Under autocast it is cast to autocast's dtype, which the output (..., O) then has.
    weight  frozen W0, (O, I) or (O, I, 1), any float dtype; never a gradient
    bias    frozen, (O,) or None
    params  trained tensors by their names in a file (``AdapterType.parameter_shapes``); gradients come in their dtype
    scale   strength * alpha / rank
    frozen  ``frozen_constants`` of the layer; may be left out for types without frozen bases, at one more read of W0
    impl    "torch": this file. "triton": ``fused_linear``. "auto": the one ``dispatch`` finds fit for x, said once

    Raises ValueError for an unknown ``impl``, an input whose last axis does not fit, an -xs type without its bases, or
    impl="triton" where no kernel can run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    weight_OI = weight.detach().flatten(1)
    if x.shape[-1] != weight_OI.shape[1]:
        raise ValueError(
            f"input has {x.shape[-1]} features, the weight {tuple(weight_OI.shape)} takes {weight_OI.shape[1]}"
        )
    if kind.xs and (frozen is None or frozen.left_OR is None):
        raise ValueError(f"{kind.name} needs the frozen bases of its layer: pass frozen=frozen_constants(weight, U, V)")
    core = params["M_xs" if kind.xs else "lora_A"]
    dtype = compute_dtype(x)
    statistic = torch.promote_types(torch.promote_types(dtype, core.dtype), torch.float32)
    if frozen is None and (kind.rows or kind.cols):
        frozen = frozen_constants(weight)
    fused = runs_fused(impl, x.device, dtype, statistic)
    product = dtype if fused else product_dtype(dtype, x.device)
    layer = Layer(kind, scale, weight_OI, frozen, product, statistic)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    trained = (core, params.get("lora_B"), params.get(kind.row_magnitude), params.get(kind.col_magnitude))
    trained = [None if value is None else value.to(statistic) for value in trained]
    bias = None if bias is None else bias.detach()
    if fused:
        # Imported here: a machine without Triton runs everything else.
        from sa3dist_kernels.fused_linear import fused_linear

        y = fused_linear(rows, *trained, bias, layer, weight)
    else:
        y = _AdaptedLinear.apply(rows, *trained, bias, layer, weight)
    return y.view(*x.shape[:-1], weight_OI.shape[0])
