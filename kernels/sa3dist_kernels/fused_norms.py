"""``weight_norms`` in few launches: the same functions on the kernels of ``thin_norms`` and ``weight_pass``.

Layouts: O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

from sa3dist_kernels.thin_norms import thin_norms, thin_norms_backward
from sa3dist_kernels.weight_norms import EPS, ColScaling, Layer, RowScaling
from sa3dist_kernels.weight_pass import weight_pass


def row_scaling(layer: Layer, left_OR, right_RI, magnitude_O, cross_OR) -> RowScaling:
    """As ``weight_norms.row_scaling``."""
    gram = right_RI @ right_RI.t()
    squares_O = layer.constant("row_squares_O")
    return RowScaling(*thin_norms(cross_OR, left_OR, gram, squares_O, magnitude_O, layer.scale, EPS), cross_OR)


def col_scaling(layer: Layer, left_OR, right_RI, magnitude_I, rows: RowScaling | None) -> ColScaling:
    """As ``weight_norms.col_scaling``."""
    if rows is None:
        weighted, squares_I = left_OR, layer.constant("col_squares_I")
        cross = layer.constant("left_weight_RI") if layer.kind.xs else layer.times_weight(left_OR)
    else:
        gain_squares = rows.gain_O.square()
        weighted = gain_squares[:, None] * left_OR
        cross, squares_I = weight_pass(layer.weight_OI, weighted, gain_squares)
    gram = left_OR.t() @ weighted
    gain, norms = thin_norms(cross.t(), right_RI.t(), gram, squares_I, magnitude_I, layer.scale, EPS)
    return ColScaling(gain, norms, weighted, cross)


def row_backward(layer: Layer, left_OR, right_RI, rows: RowScaling, slope_O, sloped_cross_RI=None):
    """As ``weight_norms.row_backward``."""
    s = layer.scale
    sloped = slope_O[:, None] * left_OR
    square = s * ((sloped.t() @ left_OR) @ right_RI)
    if layer.kind.xs:
        return None, s * (sloped.t() @ layer.constant("weight_right_OR") + square @ layer.constant("right_IR"))
    if sloped_cross_RI is None:
        sloped_cross_RI = layer.times_weight(sloped)
    grad_left = thin_norms_backward(rows.cross_OR, left_OR, right_RI @ right_RI.t(), slope_O, s)
    return grad_left, s * (sloped_cross_RI + square)


def col_backward(layer: Layer, left_OR, right_RI, rows: RowScaling | None, cols: ColScaling, grad_gain_I):
    """As ``weight_norms.col_backward``."""
    s = layer.scale
    slope_I = -grad_gain_I * cols.gain_I / ((cols.norms_I + EPS) * cols.norms_I)
    slope_I = slope_I.masked_fill(cols.norms_I == 0, 0)
    sloped = right_RI * slope_I
    gram = left_OR.t() @ cols.weighted_OR
    grad_right = thin_norms_backward(cols.cross_RI.t(), right_RI.t(), gram, slope_I, s).t()
    if layer.kind.xs and rows is None:
        return None, grad_right, None
    inner = s * (left_OR @ (sloped @ right_RI.t()))
    if rows is None:
        return s * (layer.weight_times(sloped) + inner), grad_right, None
    cross_RO, squares_O = weight_pass(layer.weight_OI.t(), sloped.t(), slope_I)
    grad_row_gain = rows.gain_O * (squares_O + s * ((2 * cross_RO.t() + inner) * left_OR).sum(1))
    grad_left = None if layer.kind.xs else s * rows.gain_O.square()[:, None] * (cross_RO.t() + inner)
    return grad_left, grad_right, grad_row_gain
