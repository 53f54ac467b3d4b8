"""Adapters in the layouts of other trainers, read as ours: PEFT, ComfyUI and kohya.

A layer is written ``<prefix><layer>.<tensor>``. Prefixes: ``base_model.model.`` (PEFT), ``diffusion_model.`` (ComfyUI)
and ``lora_unet_`` (kohya, which also turns the dots of names into underscores). Tensors: lora_A or lora_down (R, I),
lora_B or lora_up (O, R), alpha, lora_magnitude_vector (O) of a DoRA, dora_scale (1, I) of a DoRA of columns. Layers are
called as in Stable Audio 3, with or without its leading ``model.``, or as in diffusers' port.

Legend: O fan_out, I fan_in, R rank.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from sa3dist.adapters.attach import SLOT, AdapterConfig
from sa3dist.adapters.peft_format import PARTS, port_name, reordered
from sa3dist.errors import CheckpointError

PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TENSORS = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_OF_A_BLOCK = (
    *("self_attn.to_qkv", "self_attn.to_out", "cross_attn.to_q", "cross_attn.to_kv", "cross_attn.to_out"),
    *("ff.ff.0.proj", "ff.ff.2", "to_local_embed.0", "to_local_embed.2"),
)
# Every adaptable layer of Stable Audio 3, with its blocks' layers named as in the first. Source: the reference.
LAYERS = (
    *(f"model.to_{part}_embed.{i}" for part in ("timestep", "cond", "global") for i in (0, 2)),
    *("model.transformer.project_in", "model.transformer.project_out"),
    *("model.transformer.global_cond_embedder.0", "model.transformer.global_cond_embedder.2"),
    *("model.preprocess_conv", "model.postprocess_conv"),
    *(f"model.transformer.layers.0.{layer}" for layer in _OF_A_BLOCK),
    *("conditioners.seconds_total.embedder.embedding.1", "conditioners.prompt.proj_out"),
)
_BLOCK = re.compile(r"(?<=(?:layers|blocks)[._])\d+(?=[._])")


@dataclasses.dataclass(frozen=True)
class _Layer:
    """``scale * up @ down`` under one of our names; magnitude is of rows or of columns, or None."""

    up_OR: torch.Tensor
    down_RI: torch.Tensor
    scale: float
    kind: str
    magnitude: torch.Tensor | None


def peft_folders(path: Path) -> list[Path]:
    """The folders of the PEFT adapter at ``path``: itself, or one per module of diffusers' port inside."""
    return [folder for folder in (path, *(path / part for part in PARTS)) if os.path.isfile(folder / PEFT_CONFIG)]


def is_foreign(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors are in another trainer's layout, and none in ours."""
    return any(split_key(key)[1] for key in tensors) and not any(f".{SLOT}." in key for key in tensors)


def read_peft_config(path: Path) -> dict | None:
    """The adapter_config.json next to a file of weights; None if there is none. Raises CheckpointError."""
    path = path.parent / PEFT_CONFIG
    if not os.path.isfile(path):
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict) or value.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"{path}: describes no LoRA; of PEFT's adapters only LORA, with or without use_dora, is read"
        )
    return value


def to_native(
    path: Path, parts: Iterable[tuple[Mapping[str, torch.Tensor], Mapping | None]]
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """An adapter of ours from another layout's tensors, exactly: smaller ranks are padded with zeros.

    parts   (tensors, PEFT's adapter_config.json or None) of every file the adapter consists of
    Raises CheckpointError, naming file and key, for anything but a LoRA or DoRA of this model.
    """
    layers: dict[str, _Layer] = {}
    for tensors, peft in parts:
        grouped: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
        for key, value in tensors.items():
            name, tensor = split_key(key)
            if not tensor:
                raise CheckpointError(f"{path}: {key} {_not_read(key)}")
            grouped.setdefault(name, {})[tensor] = key, value
        for name, parts in grouped.items():
            key = next(iter(parts.values()))[0]
            if name.startswith(PEFT_PREFIX) and peft is None:
                raise CheckpointError(f"{path}: {key} is PEFT's, but {PEFT_CONFIG} is not next to it; put it there")
            ours = native_name(name)
            if ours is None or ours in layers:
                raise CheckpointError(
                    f"{path}: {key} is of {'a layer that is there already' if ours else 'no layer of Stable Audio 3'}; "
                    f"is this another model's adapter?"
                )
            layers[ours] = _read_layer(path, ours, name, parts, peft)
    kinds = {layer.kind: name for name, layer in layers.items()}
    if len(kinds) > 1:
        differ = " but ".join(f"{name} is {kind}" for kind, name in kinds.items())
        raise CheckpointError(f"{path}: {differ}; an adapter is of one type here, so train all layers as one")
    return _of_one_rank(layers)


def _of_one_rank(layers: Mapping[str, _Layer]) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    rank = max(layer.down_RI.shape[0] for layer in layers.values())
    scales = {layer.scale for layer in layers.values()}
    # A scale common to all layers stays outside of the factors, which then keep the file's own values.
    common = scales.pop() if len(scales) == 1 else 1.0
    tensors = {}
    for name, layer in layers.items():
        more = rank - layer.down_RI.shape[0]
        up_OR = layer.up_OR if layer.scale == common else layer.up_OR.float() * (layer.scale / common)
        tensors[f"{name}.{SLOT}.lora_A"] = torch.nn.functional.pad(layer.down_RI, (0, 0, 0, more))
        tensors[f"{name}.{SLOT}.lora_B"] = torch.nn.functional.pad(up_OR, (0, more))
        if layer.magnitude is not None:
            tensors[f"{name}.{SLOT}.magnitude"] = layer.magnitude
    alpha = common * rank
    kind = next(iter(layers.values())).kind
    # As include patterns, since no layer's name is part of another's.
    return AdapterConfig(rank, int(alpha) if alpha == int(alpha) else alpha, kind, tuple(layers)), tensors


def _read_layer(path: Path, ours: str, name: str, parts: Mapping[str, tuple[str, torch.Tensor]], peft) -> _Layer:
    for part in ("up", "down"):
        if part not in parts:
            only = next(iter(parts.values()))[0]
            raise CheckpointError(f"{path}: there is {only}, but no lora_{part} of that layer; copy the file again")
    (up_key, up), (down_key, down) = parts["up"], parts["down"]
    alpha_key, alpha = parts.get("alpha", ("", torch.ones(1)))
    if min(up.ndim, down.ndim) < 2 or up.shape[1] != down.shape[0] or alpha.numel() != 1:
        shapes = (
            f"{up_key} is {list(up.shape)}, {down_key} {list(down.shape)}, {alpha_key or 'alpha'} {list(alpha.shape)}"
        )
        raise CheckpointError(f"{path}: {shapes}; expected (out, rank), (rank, in) and one number; copy the file again")
    up_OR, down_RI = up.flatten(1), down.flatten(1)
    of_port = ours != name and "transformer_blocks" in name

    def rows(value: torch.Tensor) -> torch.Tensor:
        return reordered(ours, value, down_RI.shape[1], back=True) if of_port else value

    kind, magnitude = "lora", None
    if "magnitude" in parts:
        kind, magnitude = "dora-rows", rows(parts["magnitude"][1].reshape(-1))
    elif "dora_scale" in parts:
        key, scale = parts["dora_scale"]
        if scale.shape[0] != 1:
            raise CheckpointError(
                f"{path}: {key} is of rows, which ComfyUI divides by the norms of the base and others by those of the "
                f"sum; the file does not say which, so give the adapter as its trainer wrote it"
            )
        kind, magnitude = "dora-cols", scale.reshape(-1)
    return _Layer(rows(up_OR), down_RI, _scale(name, down_RI.shape[0], parts, peft), kind, magnitude)


def _scale(name: str, rank: int, parts: Mapping[str, tuple[str, torch.Tensor]], peft: Mapping | None) -> float:
    if peft is None:
        return float(parts["alpha"][1]) / rank if "alpha" in parts else 1.0
    module = name.removeprefix(PEFT_PREFIX)
    patterns = peft.get("alpha_pattern") or {}
    alpha = next(
        (patterns[p] for p in patterns if re.fullmatch(rf"(.*\.)?({p})", module)), peft.get("lora_alpha", rank)
    )
    return alpha / (math.sqrt(rank) if peft.get("use_rslora") else rank)


def split_key(key: str) -> tuple[str, str]:
    """(the file's name of the layer, which of its tensors); the second is empty for a key of no known layout."""
    for ending, tensor in _TENSORS.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), tensor
    return key, ""


def _not_read(key: str) -> str:
    if key.endswith((".diff", ".diff_b")):
        return "is the whole change of a weight, no adapter's tensor; give the adapter that it was made from"
    return "is no tensor of a LoRA or DoRA, the types that are read here; LoHa, LoKr and the like have to be merged"


@functools.cache
def _spellings() -> dict[str, str]:
    """Our names by those of other programs, for a model whose blocks are all the first."""
    known = {}
    for name in LAYERS:
        inner = name.removeprefix("model.")
        flat = {spelled.replace(".", "_") for spelled in (name, inner)}
        known |= dict.fromkeys((name, inner, *(f"lora_unet_{spelled}" for spelled in flat)), name)
        if name != "conditioners.prompt.proj_out":
            known[port_name(name)[1]] = name
    return known


def native_name(name: str) -> str | None:
    """Our name of a layer, or None if Stable Audio 3 has no such layer."""
    name = name.removeprefix(PEFT_PREFIX).removeprefix("diffusion_model.")
    block = _BLOCK.search(name)
    ours = _spellings().get(_BLOCK.sub("0", name, count=1))
    return ours and _BLOCK.sub(block.group(), ours) if block else ours
