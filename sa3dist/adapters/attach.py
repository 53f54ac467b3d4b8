"""Attaches an adapter to a base model, gives access to its tensors and effective weights, and detaches it."""

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

# Between a layer's name and a tensor's name in a file: defined by the file format.
SLOT = "parametrizations.weight.0"
# Files of other trainers may need a strength of some hundred.
MAX_STRENGTH = 1e6


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """An adapter's settings. ``alpha`` stays the int or float that was passed; pattern lists are None if unset."""

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
    """Attach a fresh adapter to each selected layer of ``base`` and freeze everything else under its adapter roots.

    alpha    the update is scaled by alpha / rank; None means alpha = rank
    include  substrings of layer names, ``[a-b]`` expands; unset or empty selects all layers. ``exclude`` then removes
    seed     lora_A of a layer depends only on (seed, layer name)
    bases    cache of the singular bases of -xs types; None computes them

    A fresh adapter does not change the model's output, except for rounding.
    Raises ConfigError if a setting is out of range, a pattern list matches nothing, the rank is too large for a
    selected layer, or an adapter is attached already.
    """
    config = AdapterConfig(rank, rank if alpha is None else alpha, adapter_type, include, exclude)
    if adapted_layers(base):
        raise ConfigError("an adapter is attached already; detach_adapter(base) takes it off")
    selected = require_match(list(candidate_layers(base.adapter_roots)), config.include, config.exclude)
    attach_to(base, config, selected, seed, bases)


def attach_to(
    base: Base, config: AdapterConfig, selected: Sequence[str], seed: int, bases: BasesCache | None = None
) -> None:
    """``attach_adapter`` to the layers named ``selected``. Changes nothing if it raises."""
    layers = candidate_layers(base.adapter_roots)
    _check_layers(config, {name: layers[name] for name in selected})
    for root in base.adapter_roots:
        root.requires_grad_(False)

    def adapted(name: str) -> AdaptedLayer:
        compute_bases = None if bases is None else functools.partial(bases, name)
        device = layers[name].weight.device
        # Norms and bases are computed on the weights' device.
        weight = base.fp32_weight(name, device)
        generator = torch.Generator().manual_seed(int(digest_of("lora_A", str(seed), name)[:15], 16))
        adapter = initial_adapter(config.kind, config.rank, weight, generator, compute_bases).to(device)
        return AdaptedLayer(layers[name], config.kind, adapter, config.alpha / config.rank)

    # Threads on a GPU, each with one weight. Not for -xs types: two threads must not initialise linear algebra at once.
    device = "cpu" if config.kind.xs else layers[selected[0]].weight.device
    adapted_modules = list(in_threads(adapted, selected, device))
    for name, layer in zip(selected, adapted_modules, strict=True):
        replace_layer(base, name, layer)
    base.adapter_config, base.formed_once = config, formed_once


def detach_adapter(base: Base) -> None:
    """Restore the frozen layers. Does nothing if no adapter is attached."""
    for name, layer in adapted_layers(base).items():
        replace_layer(base, name, layer.original)
    base.adapter_config, base.formed_once = None, contextlib.nullcontext
    base.dit.transformer.form_block = None
    base.dit.transformer.block_runners.clear()


@torch.no_grad()
def bake_adapter(base: Base) -> None:
    """Overwrite each adapted layer's frozen weight in memory by W' at the set strength, and detach the adapter.

    Another adapter attached afterwards acts on the result, as several adapters do in the reference.
    """
    for layer in adapted_layers(base).values():
        layer.weight.copy_(layer.effective_weight(layer.weight))
    detach_adapter(base)


@contextlib.contextmanager
def formed_once(base: Base) -> Iterator[None]:
    """A context in which all adapted layers multiply with a fixed W', computed from their current tensors and strength.

    W' has the frozen weight's dtype, as in the reference's inference; at strength 0 it is that weight. Takes as much
    memory as the frozen weights.
    """
    layers = list(adapted_layers(base).values())
    try:
        for layer in layers:
            # Not a copy at strength 0: a CPU product's rounding depends on how its operands are aligned.
            off, weight = layer.strength == 0, layer.weight.detach()
            layer.fixed_weight = weight if off else layer.effective_weight(weight).to(weight.dtype)
        yield
    finally:
        for layer in layers:
            layer.fixed_weight = None


def adapted_layers(base: Base) -> dict[str, AdaptedLayer]:
    """The adapted layers by name, in registration order."""
    return {
        name: module
        for root in base.adapter_roots
        for name, module in root.named_modules()
        if isinstance(module, AdaptedLayer)
    }


def adapter_parameters(base: Base) -> dict[str, nn.Parameter]:
    """The trained tensors by their names in a file, in registration order; empty if no adapter is attached."""
    return {
        f"{name}.{SLOT}.{parameter_name}": parameter
        for name, layer in adapted_layers(base).items()
        for parameter_name, parameter in layer.trained().items()
    }


def check_strength(strength: float) -> None:
    if not abs(strength) <= MAX_STRENGTH:
        raise ConfigError(f"strength is {strength}, expected a number up to {MAX_STRENGTH:.0f}")


def set_strength(base: Base, strength: float) -> None:
    """Scale the update: 1 as trained, 0 the base model. Magnitudes act in full at any strength but 0."""
    check_strength(strength)
    for layer in adapted_layers(base).values():
        layer.strength = float(strength)


def effective_weight(base: Base, name: str) -> torch.Tensor:
    """A layer's effective weight, float32, in the shape of its frozen weight, from the base's float32 weights.

    name  relative to its root, for example "model.transformer.layers.0.self_attn.to_qkv". For a layer without an
          adapter the frozen weight is returned
    Raises ConfigError if there is no such layer.
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
    """Replace the module called ``name`` under the root that has it. Raises KeyError if none does."""
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
