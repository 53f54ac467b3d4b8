"""A single adapted linear layer, y = W' x + bias. Nothing but its norms is kept between calls.

With W0 the frozen weight, s the scale, L and R the factors of the update, and V = W0 + s L R,

    W' = diag(g) V diag(h)      g = row magnitude / (row norms of V + eps)                 or 1
                                h = column magnitude / (column norms of diag(g) V + eps)   or 1

There are two paths. In plain torch neither W' nor its gradient is formed (``factored_linear``): norms come from thin
products with W0 (``weight_norms``) and may be shared between calls (``NormCache``). On the Triton kernels W' is formed
for each use (``formed_per_use``). Training on a GPU uses neither: it forms W' once per step (``formed_linear``).

Legend: N tokens, O fan_out, I fan_in, R rank.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.factored_linear import FactoredLinear, cross_from_product, scalings
from sa3dist_kernels.frozen_products import compute_dtype, no_autocast, product_dtype
from sa3dist_kernels.weight_norms import EPS, FrozenConstants, Layer, frozen_constants

IMPLEMENTATIONS = ("auto", "torch", "triton")


class NormCache:
    """The norms of one layer, valid as long as its trained tensors do not change.

    The micro batches of an optimiser step, and blocks recomputed in its backward pass, share them. The caller passes a
    cache for the period in which the tensors stay the same. In-place changes that torch's version counter records are
    detected too.
    """

    def __init__(self) -> None:
        self._settings: tuple = ()
        self._trained: tuple[torch.Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._result: Any = None

    def get_or_compute(self, settings: tuple, trained: Iterable[torch.Tensor], compute: Callable[[], Any]) -> Any:
        """The last result if settings and tensors are the same and unchanged, else that of ``compute``."""
        trained = tuple(trained)
        versions = tuple(tensor._version for tensor in trained)
        same = len(trained) == len(self._trained) and all(map(operator.is_, trained, self._trained))
        if self._result is None or not same or (settings, versions) != (self._settings, self._versions):
            self._result = compute()
            self._settings, self._trained, self._versions = settings, trained, versions
        return self._result


def effective_weight_reference(
    weight: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    kind: AdapterType,
    scale: float,
    frozen: FrozenConstants | None = None,
) -> torch.Tensor:
    """W' in the shape of ``weight`` and the wider dtype of weight and parameters, differentiable.

    The oracle of the factored form, and what a merge writes. ``frozen`` is needed for -xs types only.
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


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    params: Mapping[str, torch.Tensor],
    kind: AdapterType,
    scale: float,
    *,
    frozen: FrozenConstants | None = None,
    norm_cache: NormCache | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """``x @ W'.T + bias`` for any of the nine adapter types.

    x           (..., I). Under autocast, x is cast to autocast's dtype, which the output (..., O) then has
    weight      frozen W0, (O, I) or (O, I, 1), any float dtype; gets no gradient
    bias        frozen, (O,) or None
    params      trained tensors by their names in a file (``AdapterType.parameter_shapes``); gradients have their dtype
    scale       strength * alpha / rank
    frozen      ``frozen_constants`` of the layer; optional except for -xs types, at the cost of one more read of W0
    norm_cache  shares norms between calls; None computes them each time
    impl        "torch" and "auto": the factored form, on any device; "triton": W' formed per use, float32 gradients

    Raises ValueError for an unknown ``impl``, an input of the wrong width, an -xs type without its bases, or
    impl="triton" if the kernels cannot run.
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
    dtype = compute_dtype(x)
    core = params["M_xs" if kind.xs else "lora_A"]
    statistic = torch.promote_types(torch.promote_types(dtype, core.dtype), torch.float32)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    bias = None if bias is None else bias.detach()
    if impl == "triton":
        # Imported here: loading the kernels takes a quarter of a second.
        from sa3dist_kernels.formed_per_use import formed_per_use

        trained = [params[name].to(statistic) for name in kind.parameter_shapes(*weight_OI.shape, 1)]
        z = formed_per_use(rows, weight, trained, kind.name, frozen, scale)
        y = z if bias is None else z + bias.to(z.dtype)
        return y.view(*x.shape[:-1], weight_OI.shape[0])
    trained = (core, params.get("lora_B"), params.get(kind.row_magnitude), params.get(kind.col_magnitude))
    trained = [None if value is None else value.to(statistic) for value in trained]
    if frozen is None and (kind.rows or kind.cols):
        frozen = frozen_constants(weight)
    layer = Layer(kind, scale, weight_OI, frozen, product_dtype(dtype, x.device), statistic)
    cached = _cached_scalings(layer, norm_cache, params, trained, x.device)
    y = FactoredLinear.apply(rows, *trained, bias, layer, weight, cached)
    return y.view(*x.shape[:-1], weight_OI.shape[0])


def _cached_scalings(layer: Layer, norm_cache: NormCache | None, params: Mapping[str, torch.Tensor], trained, device):
    """Both scalings, through the cache; None without one, and for types that ``factored_linear`` excludes from it."""
    kind = layer.kind
    # A compiled graph must not depend on the cache's content at trace time.
    if norm_cache is None or torch.compiler.is_compiling() or cross_from_product(kind) or not (kind.rows or kind.cols):
        return None
    settings = layer.scale, layer.product, layer.statistic
    with torch.no_grad(), no_autocast(device):
        return norm_cache.get_or_compute(settings, params.values(), functools.partial(scalings, layer, *trained))
