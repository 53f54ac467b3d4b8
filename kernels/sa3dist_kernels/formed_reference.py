"""FORM and FINISH of one layer in plain torch; for the equations see ``form`` and ``finish``.

Everything is computed in the dtype of the trained tensors.

Legend: O fan_out, I fan_in, R rank.
"""

import dataclasses
from collections.abc import Mapping

import torch

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.weight_norms import EPS


@dataclasses.dataclass
class Formed:
    """What FORM computes of a layer, float32 or float64; None for what its type does not have.

    v_OI                         V = W0 + s L R
    left_OR, right_RI            L and R
    row_gain_O, row_norm_O       g (ones where rows are not scaled) and n
    row_cross_OR                 V R^T, or V Q for -xs
    col_gain_I, col_norm_I       h (ones where columns are not scaled) and c
    col_cross_RI                 E = (diag(g^2) L)^T V
    """

    v_OI: torch.Tensor
    left_OR: torch.Tensor
    right_RI: torch.Tensor
    row_gain_O: torch.Tensor
    col_gain_I: torch.Tensor
    row_norm_O: torch.Tensor | None = None
    row_cross_OR: torch.Tensor | None = None
    col_norm_I: torch.Tensor | None = None
    col_cross_RI: torch.Tensor | None = None

    def weight_OI(self) -> torch.Tensor:
        """W', with gains kept away from zero."""
        return floored(self.row_gain_O)[:, None] * self.v_OI * floored(self.col_gain_I)


def floored(gain: torch.Tensor) -> torch.Tensor:
    """The gain used in W': at least 2^-40 (float64: 2^-80) in absolute value. NaN stays NaN."""
    least = torch.full_like(gain, 2.0**-80 if gain.dtype == torch.float64 else 2.0**-40)
    return torch.where(gain.abs() < least, torch.copysign(least, gain), gain)


def form_reference(
    weight_OI: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    kind: AdapterType,
    scale: float,
    bases: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Formed:
    """FORM of one layer; ``bases`` are U (O, R) and Q (I, R) of an -xs type."""
    if kind.xs:
        core = params["M_xs"]
        left, basis = (base.to(core.dtype) for base in bases)
        right = core @ basis.t()
    else:
        left, right = params["lora_B"], params["lora_A"]
    v = torch.addmm(weight_OI.to(left.dtype), left, right, alpha=scale)
    formed = Formed(v, left, right, left.new_ones(v.shape[0]), left.new_ones(v.shape[1]))
    if kind.rows:
        formed.row_norm_O = torch.linalg.vector_norm(v, dim=1)
        formed.row_gain_O = params[kind.row_magnitude] / (formed.row_norm_O + EPS)
        formed.row_cross_OR = v @ (basis if kind.xs else right.t())
    if kind.cols:
        formed.col_norm_I = torch.linalg.vector_norm(formed.row_gain_O[:, None] * v, dim=0)
        formed.col_gain_I = params[kind.col_magnitude] / (formed.col_norm_I + EPS)
        formed.col_cross_RI = (formed.row_gain_O.square()[:, None] * left).t() @ v
    return formed


def finish_reference(
    formed: Formed,
    grads: Mapping[str, torch.Tensor],
    kind: AdapterType,
    scale: float,
    bases: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """FINISH of one layer: turns the raw sums in ``grads`` into gradients, in place."""
    g, h, v = formed.row_gain_O, formed.col_gain_I, formed.v_OI
    if not kind.xs:
        left, right = g[:, None] * grads["lora_B"], grads["lora_A"] * h
    else:
        core = grads["M_xs"].clone()
    grad_gain_O = grads[kind.row_magnitude] / floored(g) if kind.rows else None
    if kind.cols:
        grad = grads[kind.col_magnitude] / floored(h) / (formed.col_norm_I + EPS)
        q = _slope(grad, h, formed.col_norm_I)
        grads[kind.col_magnitude].copy_(grad)
        if kind.xs:
            core += (formed.col_cross_RI * q) @ bases[1].to(core.dtype)
        else:
            right = right + formed.col_cross_RI * q
            left = left + g.square()[:, None] * (v @ (formed.right_RI * q).t())
        if kind.rows:
            grad_gain_O = grad_gain_O + g * (v.square() @ q)
    if kind.rows:
        grad = grad_gain_O / (formed.row_norm_O + EPS)
        k = _slope(grad, g, formed.row_norm_O)
        grads[kind.row_magnitude].copy_(grad)
        sloped = k[:, None] * formed.left_OR
        if kind.xs:
            core += sloped.t() @ formed.row_cross_OR
        else:
            left, right = left + k[:, None] * formed.row_cross_OR, right + sloped.t() @ v
    if kind.xs:
        grads["M_xs"].copy_(scale * core)
    else:
        grads["lora_A"].copy_(scale * right)
        grads["lora_B"].copy_(scale * left)


def _slope(grad_magnitude, gain, norm):
    # In this order no intermediate leaves float32's range unless the result does. Zero where the norm is zero.
    return (-grad_magnitude * gain / norm).masked_fill(norm == 0, 0)
