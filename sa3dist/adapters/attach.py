"""Attach an adapter to a base model, reach its tensors and effective weights, detach it again."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import torch
from sa3dist_kernels import ADAPTER_TYPES, AdapterType
from torch import nn

from sa3dist.adapters.layers import AdaptedLayer, fan_limit, initial_adapter
from sa3dist.adapters.select import candidate_layers, normalise, require_match
from sa3dist.adapters.svd_bases import BasesCache
from sa3dist.errors import ConfigError
from sa3dist.formats import digest_of
from sa3dist.model.base import Base
from sa3dist.model.staged_reads import in_threads

# Between a layer's name and a tensor's name in a file: part of the file format.
SLOT = "parametrizations.weight.0"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The attached adapter. ``alpha`` keeps the number as given; the pattern lists are None when unset."""

    rank: int
    alpha: int | float
    adapter_type: str
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.adapter_type not in ADAPTER_TYPES:
            raise ConfigError(f"adapter_type is {self.adapter_type!r}, expected one of {', '.join(ADAPTER_TYPES)}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"rank is {self.rank!r}, expected a whole number of at least 1")
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not number or not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ConfigError(f"alpha is {self.alpha!r}, expected a positive number")
        object.__setattr__(self, "include", normalise(self.include, "include"))
        object.__setattr__(self, "exclude", normalise(self.exclude, "exclude"))

    @property
    def kind(self) -> AdapterType:
        return ADAPTER_TYPES[self.adapter_type]


def attach_adapter(
    base: Base,
    adapter_type: str = "dora-rows",
    rank: int = 16,
    alpha: float | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 42,
    bases: BasesCache | None = None,
) -> None:
    """Put a fresh adapter on every selected layer of ``base`` and freeze everything else under its adapter roots.

    alpha    scaling is alpha / rank; None means alpha = rank
    include  substrings of layer names, ``[a-b]`` expands; unset or empty selects every layer. ``exclude`` then removes.
    bases    cache of the singular bases of -xs types; None computes them
    seed     lora_A of a layer depends on (seed, layer name) alone, not on selection, order, device or process

    A fresh adapter leaves the model's output unchanged, to rounding.
    Raises ConfigError when a setting is out of range, a pattern list matches nothing, the rank exceeds what a selected
    layer allows, or an adapter is attached already.
    """
    config = AdapterConfig(rank, rank if alpha is None else alpha, adapter_type, include, exclude)
    if adapted_layers(base):
        raise ConfigError("an adapter is attached already; detach_adapter(base) takes it off")
    selected = require_match(list(candidate_layers(base.adapter_roots)), config.include, config.exclude)
    attach_to(base, config, selected, seed, bases)


def attach_to(
    base: Base, config: AdapterConfig, selected: Sequence[str], seed: int, bases: BasesCache | None = None
) -> None:
    """``attach_adapter`` for layers that are selected already. Changes nothing if it raises."""
    layers = candidate_layers(base.adapter_roots)
    _check_layers(config, {name: layers[name] for name in selected})
    for root in base.adapter_roots:
        root.requires_grad_(False)

    def adapted(name: str) -> AdaptedLayer:
        find_bases = None if bases is None else functools.partial(bases, name)
        device = layers[name].weight.device
        # Norms and bases are computed on the weights' device.
        weight = base.fp32_weight(name, device)
        generator = torch.Generator().manual_seed(int(digest_of("lora_A", str(seed), name)[:15], 16))
        adapter = initial_adapter(config.kind, config.rank, weight, generator, find_bases).to(device)
        return AdaptedLayer(layers[name], config.kind, adapter, config.alpha / config.rank)

    # Two threads must not be the first to use a device's linear algebra, as -xs types do. Each thread holds one weight.
    device = "cpu" if config.kind.xs else layers[selected[0]].weight.device
    made = list(in_threads(adapted, selected, device))
    for name, layer in zip(selected, made, strict=True):
        replace_layer(base, name, layer)
    base.adapter_config, base.formed_once = config, formed_once


def detach_adapter(base: Base) -> None:
    """Put the frozen layers back. Does nothing if no adapter is attached."""
    for name, layer in adapted_layers(base).items():
        replace_layer(base, name, layer.original)
    base.adapter_config, base.formed_once = None, contextlib.nullcontext
    base.dit.transformer.form_block = None
    base.dit.transformer.own_runs.clear()


@torch.no_grad()
def bake_adapter(base: Base) -> None:
    """Replace every adapted layer's frozen weight in memory by W' at the current strength, and detach the adapter.

    Another adapter may then be attached: it acts on the result, as several adapters do in the reference.
    """
    for layer in adapted_layers(base).values():
        layer.weight.copy_(layer.effective_weight(layer.weight))
    detach_adapter(base)


@contextlib.contextmanager
def formed_once(base: Base) -> Iterator[None]:
    """Inside this context every adapted layer multiplies with W', made from its current tensors and strength.

    W' has the frozen weight's dtype, as in the reference's inference; at strength 0 it is that weight. The adapted
    layers use twice the memory of their frozen weights.
    """
    layers = list(adapted_layers(base).values())
    try:
        for layer in layers:
            # At strength 0 use the very same memory: on a CPU, rounding depends on the alignment of a product's
            # operands.
            off, weight = layer.strength == 0, layer.weight.detach()
            layer.kept_weight = weight if off else layer.effective_weight(weight).to(weight.dtype)
        yield
    finally:
        for layer in layers:
            layer.kept_weight = None


def adapted_layers(base: Base) -> dict[str, AdaptedLayer]:
    """The adapted layers by name, in registration order."""
    return {
        name: module
        for root in base.adapter_roots
        for name, module in root.named_modules()
        if isinstance(module, AdaptedLayer)
    }


def adapter_parameters(base: Base) -> dict[str, nn.Parameter]:
    """Every trained tensor by its name in a file, in registration order; empty where no adapter is attached."""
    return {
        f"{name}.{SLOT}.{parameter_name}": parameter
        for name, layer in adapted_layers(base).items()
        for parameter_name, parameter in layer.trained().items()
    }


def check_strength(strength: float) -> None:
    if not math.isfinite(strength):
        raise ConfigError(f"strength is {strength}, expected a finite number")


def set_strength(base: Base, strength: float) -> None:
    """Scale the update: 1 = as trained, 0 = the base model. Magnitudes act in full at every strength but 0."""
    check_strength(strength)
    for layer in adapted_layers(base).values():
        layer.strength = float(strength)


def effective_weight(base: Base, name: str) -> torch.Tensor:
    """The weight a layer acts with, float32, in the shape of its frozen weight; made from the base's float32 weights.

    name  relative to its root, for example "model.transformer.layers.0.self_attn.to_qkv"; a layer without an adapter
          acts with its frozen weight.
    Raises ConfigError if there is no layer of that name.
    """
    adapted = adapted_layers(base)
    if name in adapted:
        return adapted[name].effective_weight(base.fp32_weight(name)).float()
    others = candidate_layers(base.adapter_roots)
    if name not in others:
        examples = ", ".join([*adapted, *others][:3])
        raise ConfigError(f"{name!r} is not an adaptable layer; names look like {examples}")
    return base.fp32_weight(name).float()


def replace_layer(base: Base, name: str, module: nn.Module) -> None:
    """Make ``module`` the child called ``name``, under the root that has such a child."""
    parent, _, leaf = name.rpartition(".")
    for root in base.adapter_roots:
        try:
            root.get_submodule(name)
        except AttributeError:
            continue
        setattr(root.get_submodule(parent), leaf, module)
        return
    raise KeyError(name)


def _check_layers(config: AdapterConfig, layers: dict[str, nn.Module]) -> None:
    per_frame = (1,), (1,), (0,), 1
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv1d) and (layer.kernel_size, layer.stride, layer.padding, layer.groups) != per_frame:
            raise ConfigError(f"{name} is {layer}; of convolutions only plain ones of kernel size 1 can be adapted")
    tightest = min(layers, key=lambda name: fan_limit(layers[name]))
    limit = fan_limit(layers[tightest])
    if config.rank > limit:
        shape = tuple(layers[tightest].weight.shape)
        raise ConfigError(
            f"rank is {config.rank}, but {tightest} {shape} allows at most {limit}; lower it or exclude it"
        )
