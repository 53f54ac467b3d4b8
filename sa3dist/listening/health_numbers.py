"""How far adapters have moved their layers' weights: drift, size and effective rank of the update, layer by layer.

Legend: O fan_out, I fan_in, R rank. D = L R is the update, s its scale, V = W0 + s D.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sa3dist_kernels.weight_norms import EPS
from torch import Tensor

from sa3dist.adapters.layers import AdaptedLayer

# Elements of W0 held at a time, in float32: 16 MB, which no training will miss.
BLOCK_ELEMENTS = 1 << 22


@dataclasses.dataclass(frozen=True)
class LayerHealth:
    """What one layer's adapter does to its weight.

    update_ratio     |s D| / |W0|, Frobenius norms; NaN if the adapter is not finite
    effective_rank   of D: exp of the entropy of its singular values as shares of their sum; 0 if D is 0
    gains            float64: trained magnitudes of rows, columns or both, divided by the norms they replace, without
                     zero rows and columns; None if the type has no magnitudes
    """

    update_ratio: float
    effective_rank: float
    gains: np.ndarray | None


@torch.no_grad()
def measure_layer(layer: AdaptedLayer) -> LayerHealth:
    """Holds at most BLOCK_ELEMENTS of the weight at once, and the factors in float64."""
    left_OR, right_RI = _factors(layer)
    values_R = singular_values(left_OR, right_RI)
    size = abs(layer.scale) * math.sqrt(float(values_R.square().sum()))
    # The squared norms are float32; sum them in float64.
    weight = math.sqrt(float(layer.adapter.frozen.row_squares_O.double().sum()))
    ratio = size / weight if weight else (0.0 if size == 0 else math.inf)
    return LayerHealth(ratio, effective_rank(values_R), _gains(layer, left_OR, right_RI))


def _factors(layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """L (O, R) and R (R, I) as trained, or as made from an -xs type's core."""
    trained, frozen = layer.trained(), layer.adapter.frozen
    if layer.kind.xs:
        return frozen.left_OR, trained["M_xs"].detach() @ frozen.right_IR.t()
    return trained["lora_B"].detach(), trained["lora_A"].detach()


def singular_values(left_OR: Tensor, right_RI: Tensor) -> Tensor:
    """Of L R, float64 (R,) on the CPU, using only R x R matrices; NaN if a factor is not finite.

    With L^T L = S^T S they are the square roots of the eigenvalues of S (R R^T) S^T. Relative to the largest they are
    accurate to 1e-8, the root of float64's rounding.
    """
    left_OR, right_RI = left_OR.double(), right_RI.double()
    inner_RR, outer_RR = (left_OR.t() @ left_OR).cpu(), (right_RI @ right_RI.t()).cpu()
    if not (inner_RR.isfinite().all() and outer_RR.isfinite().all()):
        return torch.full((len(inner_RR),), math.nan, dtype=torch.float64)
    squares_R, vectors_RR = torch.linalg.eigh(inner_RR)
    root_RR = squares_R.clamp_min(0).sqrt()[:, None] * vectors_RR.t()
    return torch.linalg.eigvalsh(root_RR @ outer_RR @ root_RR.t()).clamp_min(0).sqrt()


def effective_rank(singular_values_R: Tensor) -> float:
    """Between 1 and R; 0 if all are zero, NaN if they are. Source: Roy and Vetterli, EUSIPCO 2007."""
    total = float(singular_values_R.sum())
    if total == 0:
        return 0.0
    shares_R = singular_values_R / total
    return math.exp(-float(torch.special.xlogy(shares_R, shares_R).sum()))


def _gains(layer: AdaptedLayer, left_OR: Tensor, right_RI: Tensor) -> np.ndarray | None:
    """The factors by which W' scales the rows of V, then those by which it scales the columns of the result."""
    kind, trained = layer.kind, layer.trained()
    if not (kind.rows or kind.cols):
        return None
    weight_OI = layer.weight.detach().flatten(1)
    parts, col_squares_I = [], weight_OI.new_zeros(weight_OI.shape[1], dtype=torch.float64)
    scaled_OR = layer.scale * left_OR.float()
    rows = max(1, BLOCK_ELEMENTS // weight_OI.shape[1])
    for begin in range(0, len(weight_OI), rows):
        block_OI = torch.addmm(weight_OI[begin : begin + rows].float(), scaled_OR[begin : begin + rows], right_RI)
        if kind.rows:
            gain_O = _gain(trained[kind.row_magnitude][begin : begin + rows], torch.linalg.vector_norm(block_OI, dim=1))
            parts.append(gain_O)
            block_OI = block_OI.mul_(gain_O.nan_to_num(0.0).float()[:, None])
        if kind.cols:
            col_squares_I += torch.linalg.vector_norm(block_OI, dim=0).double().square()
    if kind.cols:
        parts.append(_gain(trained[kind.col_magnitude], col_squares_I.sqrt()))
    gains = torch.cat(parts).cpu().numpy()
    # A zero row also has a zero magnitude: it says nothing.
    return gains[~np.isnan(gains)]


def _gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """float64; NaN where the norm is 0."""
    return (magnitude.detach().double() / (norms.double() + EPS)).masked_fill(norms == 0, math.nan)


def summary(layers: Iterable[tuple[str, LayerHealth]]) -> dict[str, Any]:
    """A row's summary of the layers, those that learn most first; None for values that are not finite or missing."""
    named = sorted(layers, key=lambda pair: -np.nan_to_num(pair[1].update_ratio, nan=np.inf))
    gains = [layer.gains for _, layer in named if layer.gains is not None]
    return {
        "drift": _spread(np.concatenate(gains)) if gains else None,
        "update_ratio": _number(np.mean([layer.update_ratio for _, layer in named])),
        "effective_rank": _number(np.mean([layer.effective_rank for _, layer in named])),
        "layers": [
            {
                "name": name,
                "update_ratio": _number(layer.update_ratio),
                "effective_rank": _number(layer.effective_rank),
                "drift": None if layer.gains is None or not layer.gains.size else _number(layer.gains.mean()),
            }
            for name, layer in named
        ],
    }


def _spread(gains: np.ndarray) -> dict[str, float | None] | None:
    if not gains.size:
        return None
    low, high = np.percentile(gains, [5, 95])
    figures = {"mean": gains.mean(), "p5": low, "p95": high, "negative": (gains < 0).mean()}
    return {name: _number(value) for name, value in figures.items()}


def _number(value: float) -> float | None:
    """Rounded to six digits, float32's precision. None if not finite, which JSON cannot express."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
