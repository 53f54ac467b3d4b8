"""The torch path of ``adapted_linear``: forward and backward pass of one layer without forming W'.

    z = h * x      p = W0 z + s L (R z)      y = g * p + bias

Norms come from thin products with W0 and are differentiated, as in the reference (``weight_norms``).

Plain row-scaled types cost two matrix products, like a frozen layer: the rows of R are appended as extra tokens of
``x @ W0^T``, which yields the cross term W0 R^T of the row norms, and in the backward pass the columns of diag(k) L are
appended in ``dp @ W0``. On a CPU that beats separate thin products: 65 ms against 73, frozen 60 (1024 to 8192, N 192,
R 16). Extra tokens change the product's last bits, so these types share no norms between micro batches: bits must not
depend on the number of micro batches per step. The other types compute their norms separately and may share them
(``NormCache``).

Legend: N tokens, O fan_out, I fan_in, R rank.
"""

import dataclasses

import torch

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.frozen_products import no_autocast, times, times_transposed
from sa3dist_kernels.weight_norms import (
    EPS,
    ColScaling,
    Layer,
    RowScaling,
    col_backward,
    col_scaling,
    factors,
    row_backward,
    row_cross,
    row_scaling,
    row_slope,
)


def cross_from_product(kind: AdapterType) -> bool:
    """Whether the main product yields W0 R^T: not if columns are scaled before it or frozen bases give it for free."""
    return kind.rows and not kind.cols and not kind.xs


def _scaled(values_NX, gain_X, dtype):
    """``values * gain`` in ``dtype``, in one pass; gain None is one."""
    if gain_X is None:
        return values_NX.to(dtype)
    return torch.mul(values_NX, gain_X, out=torch.empty_like(values_NX, dtype=dtype))


def _with_room(values_NX, dtype, extra_rows: int):
    """An uninitialised buffer (N + extra_rows, X) for tokens and appended rows."""
    return values_NX.new_empty(values_NX.shape[0] + extra_rows, values_NX.shape[1], dtype=dtype)


class FactoredLinear(torch.autograd.Function):
    """Gradients reach x (N, I) and the trained tensors; ``layer``, ``bias_O`` and ``weight`` are frozen.

    cached_scalings  both scalings from ``scalings``, or None to compute them
    weight           W0 as its owner holds it. Saved instead of ``layer.weight_OI``, a view of the gathered values, so
                     that ZeRO-3 can free W0 between the passes.
    """

    @staticmethod
    def forward(ctx, x, core, left, magnitude_O, magnitude_I, bias_O, layer, weight, cached_scalings):
        with no_autocast(x.device):
            y, p, down, rows, cols = _forward(layer, x, core, left, magnitude_O, magnitude_I, bias_O, cached_scalings)
        ctx.layer, ctx.weight = dataclasses.replace(layer, weight_OI=None), weight
        ctx.has_rows, ctx.has_cols = rows is not None, cols is not None
        ctx.save_for_backward(x, core, left, p, down, *(rows or ()), *(cols or ()))
        # A view: torch 2.11 silently compiles zero gradients for a function whose result was written in place.
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
        return *grads, None, None, None, None


def scalings(layer: Layer, core, left, magnitude_O, magnitude_I) -> tuple[RowScaling | None, ColScaling | None]:
    """Both scalings, from separate products with W0."""
    L, R = factors(layer, core, left)
    rows = cols = None
    if layer.kind.rows:
        rows = row_scaling(layer, L, R, magnitude_O, row_cross(layer, core, R))
    if layer.kind.cols:
        cols = col_scaling(layer, L, R, magnitude_I, rows)
    return rows, cols


def _forward(layer: Layer, x, core, left, magnitude_O, magnitude_I, bias_O, cached_scalings):
    """y and what the backward pass needs: p (None without row scaling), R z, and both scalings.

    p is saved although y contains it: (y - bias) / g loses digits where g is small.
    """
    L, R = factors(layer, core, left)
    tokens = x.shape[0]
    if cached_scalings is None and cross_from_product(layer.kind):
        stacked = _with_room(x, layer.product, R.shape[0])
        stacked[:tokens], stacked[tokens:] = x, R
        z, product = stacked[:tokens], times_transposed(stacked, layer.weight_OI)
        p, cross = product[:tokens], product[tokens:].t().to(layer.statistic)
        rows, cols = row_scaling(layer, L, R, magnitude_O, cross), None
    else:
        rows, cols = cached_scalings or scalings(layer, core, left, magnitude_O, magnitude_I)
        z = _scaled(x, None if cols is None else cols.gain_I, layer.product)
        p = times_transposed(z, layer.weight_OI)
    down = z @ R.t().to(layer.product)
    # Contiguous L^T: this product is 1.5 times as fast on a CPU.
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
    """Gradients of (x, core, left, row magnitude, column magnitude); None for those not needed."""
    L, R = factors(layer, core, left)
    kind, tokens = layer.kind, x.shape[0]
    grad_gain_O = slope_O = sloped_cross = grad_row_magnitude = grad_col_magnitude = None
    appended = cross_from_product(kind) and needs_trained
    if rows is None:
        stacked = grad_p = grad.to(layer.product)
    else:
        stacked = _with_room(grad, layer.product, R.shape[0] if appended else 0)
        grad_p = stacked[:tokens]
        if needs_trained:
            # grad * p goes to the buffer first: on a CPU another temporary costs more than the multiplication.
            grad_gain_O = torch.mul(grad, p, out=grad_p).sum(0, dtype=layer.statistic)
        torch.mul(grad, rows.gain_O, out=grad_p)
    if appended:
        slope_O = row_slope(rows, grad_gain_O)
        stacked[tokens:] = (slope_O[:, None] * L).t()
    up = grad_p @ L.to(layer.product)
    if needs_x or cols is not None:
        product = times(stacked, layer.weight_OI)
        grad_z, sloped_cross = product[:tokens], product[tokens:].to(layer.statistic) if appended else None
        grad_z.addmm_(up, R.to(layer.product), alpha=layer.scale)
    grad_x = _scaled(grad_z, None if cols is None else cols.gain_I, x.dtype) if needs_x else None
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
