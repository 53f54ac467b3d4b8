"""Which layers of an adapter file other programs load, and the effective weights that result.

Each program by its documented rules: Stable Audio 3 (native), ComfyUI's generic loader, a base with the adapter merged.
PEFT's own loader is in ``landing_peft``.

Legend: O fan_out, I fan_in, R rank.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from torch import nn

from sa3dist.adapters.attach import SLOT
from sa3dist.adapters.comfyui_format import EPS as COMFY_EPS
from sa3dist.adapters.file import BAKED, AdapterFile, config_from_value, read_adapter_file, read_tensors
from sa3dist.adapters.lazy_file import effective
from sa3dist.adapters.select import candidate_layers, select
from sa3dist.errors import CheckpointError
from sa3dist.model.base import weight_key
from sa3dist.model.loading import BaseOnDisk
from sa3dist.model.rewrite_safetensors import DTYPES

# Largest relative difference of a change; float16 factors cause a tenth of it.
MAX_DIFFERENCE = 0.01
# Changes smaller than this share of the weight are measured relative to the weight: float32 has no more digits.
MIN_CHANGE = 1e-4
COMFY_PARTS = ("lora_up.weight", "lora_down.weight", "lora_B.weight", "lora_A.weight", "alpha", "dora_scale", "diff")

Weight = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class Landing:
    """What a program loads of a file.

    weights   layer -> function from the base's float32 weight to the layer's effective weight, in the same shape
    missed    layer, or key that belongs to no layer -> why the program ignores it
    stored    dtype the weights were rounded to
    largest   the largest relative difference of a layer that lands, and the layer; set by ``compare``
    """

    weights: dict[str, Weight] = dataclasses.field(default_factory=dict)
    missed: dict[str, str] = dataclasses.field(default_factory=dict)
    stored: torch.dtype = torch.float32
    largest: tuple[float, str] = (0.0, "")

    def compare(
        self, base: BaseOnDisk, expected: Callable[[str], torch.Tensor] | None, update: Callable[[int], None]
    ) -> None:
        """Compute every weight; layers that differ from ``expected(layer)``, or do not change, become missed.

        update   called with the number of layers done
        """
        for done, (name, weight_of) in enumerate(list(self.weights.items()), start=1):
            update(done)
            before = base.fp32_weight(name)
            actual = weight_of(before.clone()).float()
            if expected is None:
                if not actual.isfinite().all() or torch.equal(actual, before):
                    self._miss(name, "acts with a weight that is the base's own, or not finite")
                continue
            exact = expected(name).float()
            change = max(float((exact - before).norm()), MIN_CHANGE * float(before.norm()), 1e-30)
            # The difference beyond rounding to the stored dtype.
            limits = torch.finfo(self.stored)
            rounding = 0.51 * limits.eps * exact.abs().clamp(min=limits.smallest_normal)
            difference = float(((actual - exact).abs() - rounding).clamp(min=0).norm()) / change
            # Not ">", which is false for NaN.
            if not difference <= MAX_DIFFERENCE:
                self._miss(name, f"acts otherwise than the adapter: by {difference:.2g} of its change")
            elif difference >= self.largest[0]:
                self.largest = difference, name

    def _miss(self, name: str, why: str) -> None:
        del self.weights[name]
        self.missed[name] = why


def native(path: Path, base: BaseOnDisk) -> Landing:
    """Stable Audio 3: loads keys by name into the layers that include and exclude select, and ignores all others.

    Rows are divided by the file's baked norms if it has them.
    """
    return by_name(read_adapter_file(path), base.adapter_roots)


def by_name(file: AdapterFile, roots: Iterable[nn.Module]) -> Landing:
    """``native`` for a file already read, over modules that may be on the meta device."""
    layers = candidate_layers(roots)
    if file.foreign:
        why = "is in another trainer's layout; make a file of it with sa3dist export FILE --format native"
        return Landing(missed=dict.fromkeys(file.config.include, why))
    landing = Landing()
    known = set()
    for name in select(layers, file.config.include, file.config.exclude):
        shapes = file.config.kind.parameter_shapes(*layers[name].weight.flatten(1).shape, file.config.rank)
        expected = {f"{name}.{SLOT}.{tensor}": shape for tensor, shape in shapes.items()}
        known |= expected.keys()
        wrong = [key for key, shape in expected.items() if _shape(file.tensors, key) != shape]
        norms = file.baked.get(name)
        if wrong:
            key = wrong[0]
            landing.missed[name] = f"{key} is {_shape(file.tensors, key) or 'missing'}, not {expected[key]}"
        elif norms is not None and (not file.config.kind.rows or norms.shape != layers[name].weight.shape[:1]):
            landing.missed[name] = f"{BAKED} is {list(norms.shape)}, which are not the norms of its rows"
        else:
            trained = {key.rpartition(".")[2]: file.tensors[key] for key in expected}
            landing.weights[name] = functools.partial(effective, file.config, trained, norms_O=norms)
    baked = [f"{name}.{SLOT}.{BAKED}" for name in file.baked if name not in layers]
    for key in [*(key for key in file.tensors if key not in known), *baked]:
        name = key.partition(f".{SLOT}")[0]
        landing.weights.pop(name, None)
        landing.missed.setdefault(name, f"{key} is no tensor of this base with the file's lora_config, and passed over")
    return landing


def comfy(path: Path, base: BaseOnDisk) -> Landing:
    """ComfyUI's generic loader, which knows ``diffusion_model.<layer>`` and ``lora_unet_<layer_with_underscores>``."""
    tensors, _ = read_tensors(path)
    layers = candidate_layers(base.adapter_roots)
    inner = {name: name.removeprefix("model.") for name in layers if name.startswith("model.")}
    known = {f"diffusion_model.{short}": name for name, short in inner.items()}
    known |= {f"lora_unet_{short.replace('.', '_')}": name for name, short in inner.items()}
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        part = next((part for part in COMFY_PARTS if key.endswith(f".{part}")), "")
        part, name = (part, key.removesuffix(f".{part}")) if part else (key, key.partition(f".{SLOT}")[0])
        grouped.setdefault(name, {})[part.replace("lora_B", "lora_up").replace("lora_A", "lora_down")] = value
    landing = Landing()
    for key, parts in grouped.items():
        name = known.get(key)
        why = _comfy_fault(parts, layers[name].weight.shape) if name else "is no layer that ComfyUI knows: not loaded"
        if why:
            landing.missed[name or key] = why
        else:
            landing.weights[name] = functools.partial(_patched_by_comfy, parts)
    return landing


def _comfy_fault(parts: Mapping[str, torch.Tensor], shape: torch.Size) -> str:
    if "diff" in parts:
        return "" if parts["diff"].shape == shape else f"diff is {list(parts['diff'].shape)}, not {list(shape)}"
    strange = [part for part in parts if part not in COMFY_PARTS]
    missing = [part for part in ("lora_up.weight", "lora_down.weight") if part not in parts]
    if strange or missing:
        return f"{strange[0]} is not loaded" if strange else f"has no {missing[0]}"
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    flat = min(up.ndim, down.ndim) < 2
    if flat or up.shape[:1] != shape[:1] or down[0].numel() != shape[1:].numel() or up.shape[1] != down.shape[0]:
        return f"lora_up is {list(up.shape)} and lora_down {list(down.shape)}, over a weight of {list(shape)}"
    if parts.get("alpha", torch.ones(())).numel() != 1:
        return f"alpha is {list(parts['alpha'].shape)}, not one number"
    scale = parts.get("dora_scale", torch.ones(1))
    if not scale.ndim:
        return "dora_scale is one number, not one of each row or column"
    try:
        fits = torch.broadcast_shapes(scale.shape, shape) == shape
    except RuntimeError:
        fits = False
    return "" if fits else f"dora_scale is {list(scale.shape)}, over a weight of {list(shape)}"


def _patched_by_comfy(parts: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Source: ComfyUI, comfy/weight_adapter/lora.py and base.py (weight_decompose) at strength 1, since v0.3.77."""
    if "diff" in parts:
        return weight + parts["diff"].float()
    up, down = (parts[f"lora_{part}.weight"].float().flatten(1) for part in ("up", "down"))
    scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
    after = weight + (scale * up @ down).view(weight.shape)
    if "dora_scale" not in parts:
        return after
    dora_scale = parts["dora_scale"].float()
    # The first dimension decides the axis. On the output axis, norms are those of the weight before the update.
    on_rows = dora_scale.shape[0] == weight.shape[0]
    of, axes = (weight, [*range(1, weight.ndim)]) if on_rows else (after, [0, *range(2, weight.ndim)])
    return after * (dora_scale / (torch.linalg.vector_norm(of, dim=axes, keepdim=True) + COMFY_EPS))


def merged(path: Path, base: BaseOnDisk) -> Landing:
    """A base with the adapter merged in, read by our own strict loader."""
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: is no directory of a base; sa3dist export FILE --format merged makes one")
    merged_base = BaseOnDisk.open(path)
    layers = candidate_layers(base.adapter_roots)
    with safetensors.safe_open(merged_base.files.weights, framework="pt") as file:
        metadata = file.metadata() or {}
        stored = DTYPES[file.get_slice(weight_key(next(iter(layers)))).get_dtype()]
    try:
        configs = [config_from_value(part["lora_config"]) for part in json.loads(metadata["merged_from"])]
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its header does not say what was merged; is this a base as it was?") from error
    landing = Landing(stored=stored)
    for name in dict.fromkeys(name for config in configs for name in select(layers, config.include, config.exclude)):
        key = weight_key(name)
        if merged_base.weights.shapes[key] != base.weights.shapes[key]:
            landing.missed[name] = f"{key} is {merged_base.weights.shapes[key]}, {base.weights.shapes[key]} in the base"
        else:
            landing.weights[name] = lambda _, name=name: merged_base.fp32_weight(name)
    return landing


def _shape(tensors: Mapping[str, torch.Tensor], key: str) -> tuple[int, ...]:
    return tuple(tensors[key].shape) if key in tensors else ()
