"""Row and column norms of V = W0 + s L R and their gradients, from thin products with W0, without forming V.

With C = W0 R^T and E = L^T W0,

    |row i of V|^2     = |row i of W0|^2    + 2 s C_i . L_i      + s^2 L_i (R R^T) L_i^T
    |column j of V|^2  = |column j of W0|^2 + 2 s E_j . R_j      + s^2 R_j^T (L^T L) R_j

and the same for the columns of diag(g) V, with W0^2 weighted by g^2 and L^T replaced by L^T diag(g^2).

Legend: O fan_out, I fan_in, R rank. Everything here is float32 or wider, except the operands of products with W0.
"""

import dataclasses
from typing import NamedTuple

import torch

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.frozen_products import small_blocks, times, weight_times

# Added to the norm, not to its square: defined by the file format.
EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class FrozenConstants:
    """Constants derived from a layer's frozen weight, computed once.

    row_squares_O, col_squares_I     squared norms of W0's rows and columns
    left_OR, right_IR                -xs types: the singular bases U and V, else None
    weight_right_OR, left_weight_RI  -xs types: W0 V and U^T W0, from which norms need no read of W0
    """

    row_squares_O: torch.Tensor
    col_squares_I: torch.Tensor
    left_OR: torch.Tensor | None = None
    right_IR: torch.Tensor | None = None
    weight_right_OR: torch.Tensor | None = None
    left_weight_RI: torch.Tensor | None = None


def frozen_constants(weight, left_OR=None, right_IR=None) -> FrozenConstants:
    """Constants of ``weight`` (O, I) or (O, I, 1), in float32 or wider; pass the bases for -xs types only."""
    weight_OI = weight.detach().flatten(1)
    weight_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
    row_squares_O = torch.linalg.vector_norm(weight_OI, dim=1).square()
    col_squares_I = torch.linalg.vector_norm(weight_OI, dim=0).square()
    if left_OR is None:
        return FrozenConstants(row_squares_O, col_squares_I)
    left_OR, right_IR = (base.to(weight_OI).contiguous() for base in (left_OR, right_IR))
    products = weight_OI @ right_IR, left_OR.t() @ weight_OI
    return FrozenConstants(row_squares_O, col_squares_I, left_OR, right_IR, *products)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's frozen side during one forward or backward pass.

    product    dtype of operands multiplied with the weight
    statistic  dtype of norms, gains and parameter gradients
    """

    kind: AdapterType
    scale: float
    weight_OI: torch.Tensor
    frozen: FrozenConstants | None
    product: torch.dtype
    statistic: torch.dtype

    def constant(self, name: str) -> torch.Tensor:
        return getattr(self.frozen, name).to(self.statistic)

    def weight_times(self, right_RI) -> torch.Tensor:
        """``W0 @ right^T`` (O, R)."""
        return weight_times(self.weight_OI, right_RI.t().to(self.product)).to(self.statistic)

    def times_weight(self, left_OR) -> torch.Tensor:
        """``left^T @ W0`` (R, I)."""
        return times(left_OR.t().to(self.product), self.weight_OI).to(self.statistic)


def factors(layer: Layer, core, left) -> tuple[torch.Tensor, torch.Tensor]:
    """L (O, R) and R (R, I). ``core`` is the trained R or, for -xs types, M in R = M V^T, whose L is frozen."""
    core = core.to(layer.statistic)
    if layer.kind.xs:
        return layer.constant("left_OR"), core @ layer.constant("right_IR").t()
    return left.to(layer.statistic), core


class RowScaling(NamedTuple):
    """g = magnitude / (norms + eps) per output; ``cross_OR`` is W0 R^T."""

    gain_O: torch.Tensor
    norms_O: torch.Tensor
    cross_OR: torch.Tensor


class ColScaling(NamedTuple):
    """h = magnitude / (norms + eps) per input; ``weighted_OR`` is diag(g^2) L, ``cross_RI`` (diag(g^2) L)^T W0."""

    gain_I: torch.Tensor
    norms_I: torch.Tensor
    weighted_OR: torch.Tensor
    cross_RI: torch.Tensor


def row_cross(layer: Layer, core, right_RI) -> torch.Tensor:
    """W0 R^T (O, R). -xs types compute it from ``core`` (M) without reading W0."""
    return layer.constant("weight_right_OR") @ core.t() if layer.kind.xs else layer.weight_times(right_RI)


def row_scaling(layer: Layer, left_OR, right_RI, magnitude_O, cross_OR) -> RowScaling:
    inner = 2 * cross_OR + layer.scale * (left_OR @ (right_RI @ right_RI.t()))
    squares = layer.constant("row_squares_O") + layer.scale * (inner * left_OR).sum(1)
    return RowScaling(*_gain(magnitude_O, squares), cross_OR)


def col_scaling(layer: Layer, left_OR, right_RI, magnitude_I, rows: RowScaling | None) -> ColScaling:
    """Scaling of the columns of V, or of diag(g) V if rows are scaled."""
    if rows is None:
        weighted, squares = left_OR, layer.constant("col_squares_I")
        cross = layer.constant("left_weight_RI") if layer.kind.xs else layer.times_weight(left_OR)
    else:
        gain_squares = rows.gain_O.square()
        weighted = gain_squares[:, None] * left_OR
        squares, cross = _squares_and_left(layer.weight_OI, gain_squares, weighted)
    inner = 2 * cross + layer.scale * ((weighted.t() @ left_OR) @ right_RI)
    squares = squares + layer.scale * (inner * right_RI).sum(0)
    return ColScaling(*_gain(magnitude_I, squares), weighted, cross)


def row_slope(rows: RowScaling, grad_gain_O) -> torch.Tensor:
    """k (O,): the row norms contribute diag(k) V to the gradient of V. Zero where a row is zero."""
    slope = -grad_gain_O * rows.gain_O / ((rows.norms_O + EPS) * rows.norms_O)
    return slope.masked_fill(rows.norms_O == 0, 0)


def row_backward(layer: Layer, left_OR, right_RI, rows: RowScaling, slope_O, sloped_cross_RI=None):
    """The row norms' part of the gradients of L and of the trained core.

    slope_O          from ``row_slope``
    sloped_cross_RI  (diag(k) L)^T W0 if the caller has it; not used by -xs types
    Returns (grad_left (O, R), grad_core): the core is R (R, I); for -xs types it is M (R, R), and grad_left is None.
    """
    s = layer.scale
    sloped = slope_O[:, None] * left_OR
    square = s * ((sloped.t() @ left_OR) @ right_RI)
    if layer.kind.xs:
        return None, s * (sloped.t() @ layer.constant("weight_right_OR") + square @ layer.constant("right_IR"))
    if sloped_cross_RI is None:
        sloped_cross_RI = layer.times_weight(sloped)
    grad_left = s * slope_O[:, None] * (rows.cross_OR + s * (left_OR @ (right_RI @ right_RI.t())))
    return grad_left, s * (sloped_cross_RI + square)


def col_backward(layer: Layer, left_OR, right_RI, rows: RowScaling | None, cols: ColScaling, grad_gain_I):
    """The column norms' part of the gradients of L, R and the row gain.

    Returns (grad_left (O, R), grad_right (R, I), grad_row_gain (O,)). grad_left is None for -xs types, grad_row_gain
    if rows are not scaled.
    """
    s = layer.scale
    slope = -grad_gain_I * cols.gain_I / ((cols.norms_I + EPS) * cols.norms_I)
    slope = slope.masked_fill(cols.norms_I == 0, 0)
    sloped = right_RI * slope
    grad_right = s * (cols.cross_RI + s * ((cols.weighted_OR.t() @ left_OR) @ right_RI)) * slope
    if layer.kind.xs and rows is None:
        return None, grad_right, None
    inner = s * (left_OR @ (sloped @ right_RI.t()))
    if rows is None:
        return s * (layer.weight_times(sloped) + inner), grad_right, None
    squares, cross = _squares_and_right(layer.weight_OI, slope, sloped)
    grad_row_gain = rows.gain_O * (squares + s * ((2 * cross + inner) * left_OR).sum(1))
    grad_left = None if layer.kind.xs else s * rows.gain_O.square()[:, None] * (cross + inner)
    return grad_left, grad_right, grad_row_gain


def _gain(magnitude, squares):
    # Clamped: if a row nearly vanishes, rounding can make the sum of its three terms negative.
    norms = squares.clamp_min(0).sqrt()
    return magnitude / (norms + EPS), norms


def _square_elements(weight_OI):
    # On a CPU blocks should stay in its cache (1 MiB of float32); on a GPU launches should be few (64 MiB).
    return 1 << (18 if weight_OI.device.type == "cpu" else 24)


def _squares_and_left(weight_OI, squares_O, left_OR):
    """``squares @ W0^2`` (I,) and ``left^T @ W0`` (R, I) in one read of W0."""
    total = left_OR.new_zeros(weight_OI.shape[1])
    cross = left_OR.new_zeros(left_OR.shape[1], weight_OI.shape[1])
    for span, block in small_blocks(weight_OI, left_OR.dtype, _square_elements(weight_OI)):
        total += squares_O[span] @ block.square()
        cross.addmm_(left_OR[span].t(), block)
    return total, cross


def _squares_and_right(weight_OI, squares_I, right_RI):
    """``W0^2 @ squares`` (O,) and ``W0 @ right^T`` (O, R) in one read of W0."""
    total = right_RI.new_empty(weight_OI.shape[0])
    cross = right_RI.new_empty(weight_OI.shape[0], right_RI.shape[0])
    for span, block in small_blocks(weight_OI, right_RI.dtype, _square_elements(weight_OI)):
        torch.mv(block.square(), squares_I, out=total[span])
        torch.mm(block, right_RI.t(), out=cross[span])
    return total, cross
