"""The module that replaces a frozen layer: same name, same weight, plus its adapter."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from sa3dist_kernels import (
    AdapterType,
    FormedLayer,
    FrozenConstants,
    NormCache,
    adapted_linear,
    effective_weight_reference,
    formed_linear,
    frozen_constants,
    frozen_linear,
    gated_formed_linear,
    silu_gated,
)
from torch import nn

from sa3dist.adapters.svd_bases import Bases, singular_bases


class AdapterTensors(nn.Module):
    """Trained tensors of one layer, under their names in a file, and the frozen constants of its weight.

    Both stay float32 when the base around them is cast to a narrower dtype; they follow its device, and a cast to
    float64.
    """

    def __init__(self, trained: dict[str, torch.Tensor], frozen: FrozenConstants):
        super().__init__()
        for name, value in trained.items():
            self.register_parameter(name, nn.Parameter(value))
        for name, value in vars(frozen).items():
            self.register_buffer(name, value, persistent=False)

    @property
    def frozen(self) -> FrozenConstants:
        return FrozenConstants(*(getattr(self, field.name) for field in dataclasses.fields(FrozenConstants)))

    def _apply(self, fn, recurse=True):
        def keep_precision(value):
            moved = fn(value)
            narrowed = moved.dtype.is_floating_point and moved.dtype.itemsize < value.dtype.itemsize
            return value.to(moved.device) if narrowed else moved

        return super()._apply(keep_precision, recurse)


class AdaptedLayer(nn.Module):
    """An ``nn.Linear`` or kernel-size-1 ``nn.Conv1d`` with an adapter over its frozen weight.

    Linear  (..., fan_in) to (..., fan_out)        Conv1d  (B, fan_in, T) to (B, fan_out, T)
    ``weight`` and ``bias`` are the frozen layer's own parameters, so the base keeps its state-dict keys. The adapter's
    position in the module tree gives its names in a file: ``<layer>.parametrizations.weight.0.lora_A``.
    """

    def __init__(self, layer: nn.Linear | nn.Conv1d, kind: AdapterType, adapter: AdapterTensors, scale: float):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.parametrizations = nn.ModuleDict({"weight": nn.ModuleList([adapter])})
        self.kind = kind
        self.channels_first = isinstance(layer, nn.Conv1d)
        # alpha / rank, multiplied by ``strength``, which is 1 in training and adjustable afterwards.
        self.scale = scale
        self.strength = 1.0
        # Set by ``cached_norms``, while the trained tensors do not change.
        self.norm_cache: NormCache | None = None
        # Set where W' is formed: the weight that passes read, and the leaf that receives the raw sums.
        self.formed: FormedLayer | None = None
        self.sums: torch.Tensor | None = None
        # Set by ``formed_once``: W' in the frozen weight's shape and dtype, the only weight then used.
        self.kept_weight: torch.Tensor | None = None
        # In a tuple: a module assigned as an attribute would be registered, and the weight would have two names.
        self._original = (layer,)

    @property
    def adapter(self) -> AdapterTensors:
        return self.parametrizations["weight"][0]

    @property
    def original(self) -> nn.Linear | nn.Conv1d:
        """The frozen layer that was replaced."""
        return self._original[0]

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.adapter.named_parameters(recurse=False))

    def forward(self, x):
        if self.kept_weight is not None:
            # The frozen layer's own function: with its own weight the result is its own, bit for bit.
            return (F.conv1d if self.channels_first else F.linear)(x, self.kept_weight, self.bias)
        return self._linear(x.transpose(1, 2)).transpose(1, 2) if self.channels_first else self._linear(x)

    def _linear(self, x):
        if self.strength == 0:
            # Strength 0 is the base layer by definition, with or without magnitudes; the limit of small strengths
            # differs.
            return frozen_linear(x, self.weight.flatten(1), self.bias)
        if self.formed is not None:
            return self._with_bias(formed_linear(x, *self._formed_operands))
        named = {"frozen": self.adapter.frozen, "norm_cache": self.norm_cache}
        return adapted_linear(x, self.weight, self.bias, self.trained(), self.kind, self.strength * self.scale, **named)

    @property
    def _formed_operands(self):
        return self.sums, self.formed.weight_OI, self.formed.left_OR, self.formed.right_RI, self.kind

    def _with_bias(self, z):
        return z if self.bias is None else z + self.bias.to(z.dtype)

    @property
    def _multiplies_formed(self) -> bool:
        return self.formed is not None and self.strength != 0 and self.kept_weight is None

    def before_bias(self, x):
        """A linear layer's ``forward`` as product and bias, which the caller adds; bias None: already added."""
        if self._multiplies_formed:
            return formed_linear(x, *self._formed_operands), self.bias
        return self(x), None

    def of_gated(self, z, gate_bias):
        """A linear layer's ``forward`` of ``silu_gated(z, gate_bias)``; only z is kept for the backward pass."""
        if self._multiplies_formed and z.requires_grad and z.dtype == self.formed.weight_OI.dtype:
            return self._with_bias(gated_formed_linear(z, gate_bias, *self._formed_operands))
        return self(silu_gated(z, gate_bias))

    @torch.no_grad()
    def effective_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W' made from ``weight``, the frozen weight at the wanted precision."""
        weight = weight.to(self.weight.device, copy=True)
        if self.strength == 0:
            return weight
        return effective_weight_reference(
            weight, self.trained(), self.kind, self.strength * self.scale, self.adapter.frozen
        )


def cached_norms(layers: Iterable[AdaptedLayer]) -> contextlib.AbstractContextManager[None]:
    """Inside this context each layer computes its norms once; the trained tensors must not change meanwhile.

    The layers keep copies of a few tensors as large as their trained tensors.
    """
    return _norm_caches(layers, NormCache)


def uncached_norms(layers: Iterable[AdaptedLayer]) -> contextlib.AbstractContextManager[None]:
    """Inside this context every call of a layer computes its norms, even within ``cached_norms``."""
    return _norm_caches(layers, lambda: None)


@contextlib.contextmanager
def _norm_caches(layers: Iterable[AdaptedLayer], make: Callable[[], NormCache | None]) -> Iterator[None]:
    before = [(layer, layer.norm_cache) for layer in layers]
    for layer, _ in before:
        layer.norm_cache = make()
    try:
        yield
    finally:
        for layer, cache in before:
            layer.norm_cache = cache


def fan_limit(layer: nn.Linear | nn.Conv1d) -> int:
    """The largest rank a layer allows: the smaller side of its weight as a matrix."""
    return min(layer.weight.flatten(1).shape)


def initial_adapter(
    kind: AdapterType,
    rank: int,
    weight: torch.Tensor,
    generator: torch.Generator,
    find_bases: Callable[[torch.Tensor, int], Bases] | None = None,
) -> AdapterTensors:
    """A fresh adapter, W' = W0 up to rounding.

    weight     the frozen weight in float32, at inference's precision: bases and norms depend on it, and are computed
               on its device
    generator  a CPU generator of this layer's own; draws lora_A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    find_bases  returns the singular bases of -xs types for (weight, rank); None: ``singular_bases``
    """
    weight_OI = weight.detach().flatten(1).float()
    fan_out, fan_in = weight_OI.shape
    frozen = frozen_constants(weight_OI, *((find_bases or singular_bases)(weight_OI, rank) if kind.xs else ()))
    initial = {
        "lora_A": lambda shape: torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator),
        kind.row_magnitude: lambda shape: frozen.row_squares_O.sqrt(),
        kind.col_magnitude: lambda shape: frozen.col_squares_I.sqrt(),
    }
    shapes = kind.parameter_shapes(fan_out, fan_in, rank)
    return AdapterTensors({name: initial.get(name, torch.zeros)(shape) for name, shape in shapes.items()}, frozen)
