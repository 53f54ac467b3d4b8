"""The adapted layer from Triton kernels, as operators that the compiler, autograd and checkpointing see through.

The maths of ``adapted_linear`` in three operators, each with a fake implementation:

    sa3dist::norm_state               gains, norms and cross terms of the scaled types, from the trained tensors alone
    sa3dist::adapted_linear           y and R z, one ``scaled_matmul``; autograd goes to the next
    sa3dist::adapted_linear_backward  every gradient: ``gain_gradient``, then one ``scaled_matmul`` towards x, in which
                                      the row norms' term (diag(k) L)^T W0 rides along as further rows

Kept for the backward pass, beyond x and y, which their producer and consumer keep anyway: N R + O(R (O + I)) numbers.
Gains scale the thin factors instead of the tokens wherever that gives the same product: (h x) R^T = x (h R)^T.

Layouts: N tokens, O fan_out, I fan_in, R rank.
"""

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.frozen_products import no_autocast
from sa3dist_kernels.fused_norms import col_backward, col_scaling, row_backward, row_scaling
from sa3dist_kernels.gain_gradient import gain_gradient
from sa3dist_kernels.scaled_matmul import scaled_matmul
from sa3dist_kernels.triton_support import check_triton
from sa3dist_kernels.weight_norms import (
    EPS,
    ColScaling,
    FrozenConstants,
    Layer,
    RowScaling,
    factors,
    row_cross,
    row_slope,
)

# The operators' schemas are read off these annotations, and know no other spelling.
Maybe = Optional[Tensor]  # noqa: UP045


class NormState(NamedTuple):
    """What the scaled types make of their trained tensors, once per change of these; empty where a type has no use.

    row_gain_O, row_norms_O, row_cross_OR    as in ``RowScaling``
    col_gain_I, col_norms_I, col_cross_RI    as in ``ColScaling``
    """

    row_gain_O: Tensor
    row_norms_O: Tensor
    row_cross_OR: Tensor
    col_gain_I: Tensor
    col_norms_I: Tensor
    col_cross_RI: Tensor

    def rows(self) -> RowScaling | None:
        return RowScaling(*self[:3]) if self.row_gain_O.numel() else None

    def cols(self, left_OR: Tensor) -> ColScaling | None:
        if not self.col_gain_I.numel():
            return None
        rows = self.rows()
        weighted_OR = left_OR if rows is None else rows.gain_O.square()[:, None] * left_OR
        return ColScaling(self.col_gain_I, self.col_norms_I, weighted_OR, self.col_cross_RI)


class Constants(NamedTuple):
    """``FrozenConstants`` as an operator takes them."""

    row_squares_O: Maybe
    col_squares_I: Maybe
    left_OR: Maybe
    right_IR: Maybe
    weight_right_OR: Maybe
    left_weight_RI: Maybe


def _layer(weight, constants, rows, cols, xs, scale, product) -> Layer:
    kind = AdapterType("", rows, cols, xs)
    return Layer(kind, scale, weight.flatten(1), FrozenConstants(*constants), product, torch.float32)


@torch.library.custom_op("sa3dist::norm_state", mutates_args=())
def norm_state_op(
    like: Tensor, weight: Tensor, core: Tensor, left: Maybe, magnitude_O: Maybe, magnitude_I: Maybe,
    row_squares_O: Maybe, col_squares_I: Maybe, left_OR: Maybe, right_IR: Maybe, weight_right_OR: Maybe,
    left_weight_RI: Maybe, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``NormState`` of a layer whose products are in the format of ``like``."""
    constants = (row_squares_O, col_squares_I, left_OR, right_IR, weight_right_OR, left_weight_RI)
    xs = left is None
    layer = _layer(weight, constants, magnitude_O is not None, magnitude_I is not None, xs, scale, like.dtype)
    with no_autocast(weight.device):
        L, R = factors(layer, core, left)
        rows = cols = None
        if magnitude_O is not None:
            rows = row_scaling(layer, L, R, magnitude_O, row_cross(layer, core, R))
        if magnitude_I is not None:
            cols = col_scaling(layer, L, R, magnitude_I, rows)
    unused = (core.new_empty(0) for _ in range(6))
    of_rows = [next(unused) for _ in range(3)] if rows is None else [rows.gain_O, rows.norms_O, rows.cross_OR]
    if cols is None:
        return *of_rows, next(unused), next(unused), next(unused)
    # An operator must not return one of its arguments: for a frozen left factor the cross term is a constant.
    cross_RI = cols.cross_RI.clone() if cols.cross_RI is left_weight_RI else cols.cross_RI
    return *of_rows, cols.gain_I, cols.norms_I, cross_RI


@norm_state_op.register_fake
def _(
    like, weight, core, left, magnitude_O, magnitude_I, row_squares_O, col_squares_I, left_OR, right_IR,
    weight_right_OR, left_weight_RI, scale,
):  # fmt: skip
    (O, I), R = weight.shape[:2], core.shape[0]
    shapes = [(O,), (O,), (O, R)] if magnitude_O is not None else [(0,)] * 3
    shapes += [(I,), (I,), (R, I)] if magnitude_I is not None else [(0,)] * 3
    return tuple(core.new_empty(shape) for shape in shapes)


@torch.library.custom_op("sa3dist::adapted_linear", mutates_args=())
def adapted_linear_op(
    x: Tensor, weight: Tensor, bias_O: Maybe, core: Tensor, left: Maybe, magnitude_O: Maybe, magnitude_I: Maybe,
    row_squares_O: Maybe, col_squares_I: Maybe, left_OR: Maybe, right_IR: Maybe, weight_right_OR: Maybe,
    left_weight_RI: Maybe, row_gain_O: Tensor, row_norms_O: Tensor, row_cross_OR: Tensor, col_gain_I: Tensor,
    col_norms_I: Tensor, col_cross_RI: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (N, O) and R z (N, R) in the format of x."""
    constants = (row_squares_O, col_squares_I, left_OR, right_IR, weight_right_OR, left_weight_RI)
    layer = _layer(weight, constants, magnitude_O is not None, magnitude_I is not None, left is None, scale, x.dtype)
    with no_autocast(x.device):
        L, R = factors(layer, core, left)
        col_gain = col_gain_I if magnitude_I is not None else None
        down = x @ _gained(R, col_gain).t().to(x.dtype)
        y, _, _ = scaled_matmul(
            x, layer.weight_OI.t(), down, L.t(), scale, left_gain_K=col_gain, bias_M=bias_O,
            out_gain_M=row_gain_O if magnitude_O is not None else None,
        )  # fmt: skip
    return y, down


@adapted_linear_op.register_fake
def _(x, weight, bias_O, core, *_):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], core.shape[0])


def _wanted(values, needs_x: bool, needs_trained: bool) -> list[bool]:
    """Which of (x, core, left, row magnitude, column magnitude) the backward operator differentiates."""
    return [needs_x, *(needs_trained and value is not None for value in values[1:])]


@torch.library.custom_op("sa3dist::adapted_linear_backward", mutates_args=())
def adapted_linear_backward_op(
    grad: Tensor, y: Tensor, down: Tensor, x: Tensor, weight: Tensor, bias_O: Maybe, core: Tensor, left: Maybe,
    magnitude_O: Maybe, magnitude_I: Maybe, row_squares_O: Maybe, col_squares_I: Maybe, left_OR: Maybe, right_IR: Maybe,
    weight_right_OR: Maybe, left_weight_RI: Maybe, row_gain_O: Tensor, row_norms_O: Tensor, row_cross_OR: Tensor,
    col_gain_I: Tensor, col_norms_I: Tensor, col_cross_RI: Tensor, scale: float, needs_x: bool, needs_trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, core, left and both magnitudes; a tensor without elements for what nobody asked for."""
    constants = (row_squares_O, col_squares_I, left_OR, right_IR, weight_right_OR, left_weight_RI)
    layer = _layer(weight, constants, magnitude_O is not None, magnitude_I is not None, left is None, scale, x.dtype)
    state = NormState(row_gain_O, row_norms_O, row_cross_OR, col_gain_I, col_norms_I, col_cross_RI)
    with no_autocast(x.device):
        found = _backward(layer, state, grad.contiguous(), y, down, x, bias_O, core, left, needs_x, needs_trained)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


@adapted_linear_backward_op.register_fake
def _(grad, y, down, x, weight, bias_O, core, left, magnitude_O, magnitude_I, *rest):
    values = x, core, left, magnitude_O, magnitude_I
    wanted = _wanted(values, *rest[-2:])
    return tuple(torch.empty_like(v) if w else x.new_empty(0) for v, w in zip(values, wanted, strict=True))


def _gained(thin, gain):
    """A thin factor with a gain along its last axis; a gain of None is one."""
    return thin if gain is None else thin * gain


def _thin_product(left, right):
    """``left @ right`` in float32: sums over all tokens leave their format only once, after the gains."""
    if left.device.type == "cuda" and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _backward(layer: Layer, state: NormState, grad, y, down, x, bias_O, core, left, needs_x, needs_trained):
    L, R = factors(layer, core, left)
    kind, s = layer.kind, layer.scale
    rows, cols = state.rows(), state.cols(L)
    row_gain = None if rows is None else rows.gain_O
    col_gain = None if cols is None else cols.gain_I
    grad_gain_O = slope_O = tail = None
    if rows is not None and needs_trained:
        grad_gain_O = gain_gradient(
            grad, y, row_gain, bias_O, x, layer.weight_OI.t(), down, L.t(), s, left_gain_K=col_gain
        )
        if cols is None and not kind.xs:
            slope_O = row_slope(rows, grad_gain_O)
            tail = (slope_O[:, None] * L).t().to(x.dtype)
    up = grad @ _gained(L.t(), row_gain).t().to(x.dtype)
    grad_x = sums_I = sloped_cross_RI = None
    if needs_x or (cols is not None and needs_trained):
        grad_x, sums_I, sloped_cross_RI = scaled_matmul(
            grad, layer.weight_OI, up, R, s, left_gain_K=row_gain, out_gain_M=col_gain,
            other_NM=x if cols is not None and needs_trained else None, tail_TK=tail,
        )  # fmt: skip
    if not needs_trained:
        return grad_x, None, None, None, None

    grad_right = s * _gained(_thin_product(up.t(), x), col_gain)
    grad_left = None if kind.xs else s * _gained(_thin_product(grad.t(), down).t(), row_gain).t()
    grad_magnitude_O = grad_magnitude_I = None
    if cols is not None:
        grad_magnitude_I = sums_I / (cols.norms_I + EPS)
        norm_left, norm_right, norm_gain = col_backward(layer, L, R, rows, cols, sums_I)
        grad_right += norm_right
        grad_left = grad_left if norm_left is None else grad_left + norm_left
        grad_gain_O = grad_gain_O if norm_gain is None else grad_gain_O + norm_gain
    grad_core = grad_right @ layer.constant("right_IR") if kind.xs else grad_right
    if rows is not None:
        grad_magnitude_O = grad_gain_O / (rows.norms_O + EPS)
        slope_O = row_slope(rows, grad_gain_O) if slope_O is None else slope_O
        norm_left, norm_core = row_backward(layer, L, R, rows, slope_O, sloped_cross_RI)
        grad_core = grad_core + norm_core
        grad_left = grad_left if norm_left is None else grad_left + norm_left
    return grad_x if needs_x else None, grad_core, grad_left, grad_magnitude_O, grad_magnitude_I


def _keep(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, grad, _):
    needs_x, _, _, *needs_trained = ctx.needs_input_grad[:7]
    # Once: under checkpointing every look recomputes, and a second one is refused.
    kept = ctx.saved_tensors
    found = adapted_linear_backward_op(grad, *kept, ctx.scale, needs_x, any(needs_trained))
    x, _, _, *trained = kept[2:9]
    wanted = _wanted((x, *trained), needs_x, any(needs_trained))
    grad_x, *grad_trained = (gradient if w else None for gradient, w in zip(found, wanted, strict=True))
    return grad_x, None, None, *grad_trained, *[None] * 13


adapted_linear_op.register_autograd(_differentiate, setup_context=_keep)


def norm_state(layer: Layer, like, weight, core, left, magnitude_O, magnitude_I) -> NormState:
    """What does not depend on the input; not differentiable by itself: the layer's backward pass sees to that."""
    trained = [None if value is None else value.detach() for value in (core, left, magnitude_O, magnitude_I)]
    return NormState(*norm_state_op(like.detach(), weight.detach(), *trained, *_constants(layer), layer.scale))


def _constants(layer: Layer) -> Constants:
    if layer.frozen is None:
        return Constants(*[None] * 6)
    return Constants(*[getattr(layer.frozen, name) for name in Constants._fields])


def fused_linear(x, core, left, magnitude_O, magnitude_I, bias_O, layer: Layer, weight, recall=None):
    """``adapted_linear`` for rows x (N, I) of float32, float16 or bfloat16; trained tensors are float32.

    weight  W0 as its owner has it, (O, I) or (O, I, 1): kept for the backward pass, as ``nn.Linear`` keeps it
    recall  returns what the given function returned when the trained tensors last changed; None calls it anew
    Raises ValueError where Triton cannot run.
    """
    check_triton(x)
    trained = core, left, magnitude_O, magnitude_I
    find = functools.partial(norm_state, layer, x, weight, *trained)
    state = find() if recall is None else recall(find)
    y, _ = adapted_linear_op(x, weight, bias_O, *trained, *_constants(layer), *state, layer.scale)
    return y
