"""The module that replaces a frozen layer: the same name and weight, plus an adapter."""

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
    """One layer's trained tensors, under their names in a file, and the frozen constants of its weight.

    Casting the base to a narrower dtype leaves both in float32; a cast to float64 or another device applies to them.
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
    ``weight`` and ``bias`` are the frozen layer's parameters, so the base's state-dict keys do not change. The path in
    the module tree gives the tensors' names in a file: ``<layer>.parametrizations.weight.0.lora_A``.
    """

    def __init__(self, layer: nn.Linear | nn.Conv1d, kind: AdapterType, adapter: AdapterTensors, scale: float):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.parametrizations = nn.ModuleDict({"weight": nn.ModuleList([adapter])})
        self.kind = kind
        self.channels_first = isinstance(layer, nn.Conv1d)
        # scale is alpha / rank; strength multiplies it, and is 1 in training.
        self.scale = scale
        self.strength = 1.0
        # Set by ``cached_norms`` while the trained tensors do not change.
        self.norm_cache: NormCache | None = None
        # Set in training with formed weights: what passes read, and the leaf whose gradient are the raw sums.
        self.formed: FormedLayer | None = None
        self.sums: torch.Tensor | None = None
        # Set by ``formed_once``: W' in the frozen weight's shape and dtype, used instead of the adapter.
        self.fixed_weight: torch.Tensor | None = None
        # In a tuple: a module assigned as an attribute would be registered, and the weight named twice.
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
        if self.fixed_weight is not None:
            # The frozen layer's own function, so that with its own weight the result is the same to the bit.
            return (F.conv1d if self.channels_first else F.linear)(x, self.fixed_weight, self.bias)
        return self._linear(x.transpose(1, 2)).transpose(1, 2) if self.channels_first else self._linear(x)

    def _linear(self, x):
        if self.strength == 0:
            # Strength 0 is the base layer by definition; with magnitudes the limit of small strengths differs.
            return frozen_linear(x, self.weight.flatten(1), self.bias)
        if self.formed is not None:
            return self._with_bias(formed_linear(x, *self._formed_operands))
        return adapted_linear(
            x,
            self.weight,
            self.bias,
            self.trained(),
            self.kind,
            self.strength * self.scale,
            frozen=self.adapter.frozen,
            norm_cache=self.norm_cache,
        )

    @property
    def _formed_operands(self):
        return self.sums, self.formed.weight_OI, self.formed.left_OR, self.formed.right_RI, self.kind

    def _with_bias(self, z):
        return z if self.bias is None else z + self.bias.to(z.dtype)

    @property
    def _uses_formed(self) -> bool:
        return self.formed is not None and self.strength != 0 and self.fixed_weight is None

    def before_bias(self, x):
        """``forward`` of a linear layer as (product, bias) to be added; bias None: already added."""
        if self._uses_formed:
            return formed_linear(x, *self._formed_operands), self.bias
        return self(x), None

    def of_gated(self, z, gate_bias):
        """``forward`` of a linear layer for ``silu_gated(z, gate_bias)``, fused: only z is saved for backward."""
        if self._uses_formed and z.requires_grad and z.dtype == self.formed.weight_OI.dtype:
            return self._with_bias(gated_formed_linear(z, gate_bias, *self._formed_operands))
        return self(silu_gated(z, gate_bias))

    @torch.no_grad()
    def effective_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W' computed from ``weight``, the frozen weight in the desired precision."""
        weight = weight.to(self.weight.device, copy=True)
        if self.strength == 0:
            return weight
        return effective_weight_reference(
            weight, self.trained(), self.kind, self.strength * self.scale, self.adapter.frozen
        )


def cached_norms(layers: Iterable[AdaptedLayer]) -> contextlib.AbstractContextManager[None]:
    """A context in which each layer computes its norms once; the caller must not change the trained tensors in it.

    The layers keep a few tensors of the size of their trained tensors.
    """
    return _norm_caches(layers, NormCache)


def uncached_norms(layers: Iterable[AdaptedLayer]) -> contextlib.AbstractContextManager[None]:
    """A context in which every call of a layer computes its norms, even inside ``cached_norms``."""
    return _norm_caches(layers, lambda: None)


@contextlib.contextmanager
def _norm_caches(layers: Iterable[AdaptedLayer], make: Callable[[], NormCache | None]) -> Iterator[None]:
    saved = [(layer, layer.norm_cache) for layer in layers]
    for layer, _ in saved:
        layer.norm_cache = make()
    try:
        yield
    finally:
        for layer, cache in saved:
            layer.norm_cache = cache


def fan_limit(layer: nn.Linear | nn.Conv1d) -> int:
    """The largest rank for a layer: the smaller side of its weight matrix."""
    return min(layer.weight.flatten(1).shape)


def initial_adapter(
    kind: AdapterType,
    rank: int,
    weight: torch.Tensor,
    generator: torch.Generator,
    compute_bases: Callable[[torch.Tensor, int], Bases] | None = None,
) -> AdapterTensors:
    """A fresh adapter, with W' = W0 up to rounding.

    weight         the frozen weight in float32, as inference has it; its bases and norms are computed on its device
    generator      this layer's CPU generator; draws lora_A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    compute_bases  singular bases of -xs types from (weight, rank); None: ``singular_bases``
    """
    weight_OI = weight.detach().flatten(1).float()
    fan_out, fan_in = weight_OI.shape
    frozen = frozen_constants(weight_OI, *((compute_bases or singular_bases)(weight_OI, rank) if kind.xs else ()))
    initial = {
        "lora_A": lambda shape: torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator),
        kind.row_magnitude: lambda shape: frozen.row_squares_O.sqrt(),
        kind.col_magnitude: lambda shape: frozen.col_squares_I.sqrt(),
    }
    shapes = kind.parameter_shapes(fan_out, fan_in, rank)
    return AdapterTensors({name: initial.get(name, torch.zeros)(shape) for name, shape in shapes.items()}, frozen)
