"""Experimental: writes an adapter as PEFT folders for ``PeftModel``, under our names or for diffusers' port.

Under our names it is one folder, which Stable Audio 3's MLX runtime also reads. The port has two modules for what one
adapter file covers, ``transformer`` and ``duration_embedder``; each becomes a folder with adapter_config.json and
adapter_model.safetensors. PEFT's LoRA is our lora, its DoRA our dora-rows; it cannot scale columns. -xs types are
written as the factors of their update.

Legend: O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sa3dist.errors import ConfigError

if TYPE_CHECKING:
    from sa3dist.adapters.file import AdapterFile
    from sa3dist.adapters.lazy_file import AdapterOnDisk

PARTS = TRANSFORMER, DURATION = "transformer", "duration_embedder"
# Names that differ in the port; the first match is replaced. Source: diffusers 0.42, scripts and model.
_RENAMED = (
    (re.compile(r"^transformer\.layers\."), "transformer_blocks."),
    (re.compile(r"^transformer\.project_(in|out)$"), r"proj_\1"),
    (re.compile(r"^transformer\."), ""),
)
_RENAMED_INSIDE = ((".ff.ff.0.proj", ".ff.proj_in"), (".ff.ff.2", ".ff.proj_out"))
_DURATION_LAYER = "conditioners.seconds_total.embedder.embedding.1"
# Our rows of a differential to_qkv are q, k, v, q', k'; the port's are q, q', k, k', v.
_DIFFERENTIAL_ORDER = (0, 3, 1, 4, 2)


def to_peft(
    file: AdapterFile, base: Callable[[], AdapterOnDisk], port: bool = True
) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """Folder name -> (adapter_config.json, tensors), for the modules the adapter covers.

    base   returns the adapter on its base; called for -xs types
    port   for diffusers' port; else for the model under our names, as one folder called ``.``
    Raises ConfigError for types that scale columns, and for layers the port does not have.
    """
    config = file.config
    if config.kind.cols:
        raise ConfigError(f"{file.path}: PEFT has no adapter for columns, which {config.adapter_type} scales")
    adapter = base() if config.kind.xs else None
    parts: dict[str, tuple[list[str], dict[str, torch.Tensor]]] = {}
    for name, trained in file.layers().items():
        part, target = port_name(name) if port else (".", name)
        up, down = adapter.factors(name) if adapter else (trained["lora_B"], trained["lora_A"])
        up = reordered(name, up, down.shape[1]) if port else up
        targets, tensors = parts.setdefault(part, ([], {}))
        targets.append(target)
        # A convolution's factors are convolutions of kernel size 1.
        tail = (1,) if name.endswith("_conv") else ()
        prefix = f"base_model.model.{target}"
        tensors[f"{prefix}.lora_A.weight"] = down.reshape(*down.shape, *tail).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = up.reshape(*up.shape, *tail).contiguous()
        if config.kind.rows:
            magnitude = trained["magnitude"]
            magnitude = reordered(name, magnitude, down.shape[1]) if port else magnitude
            shape = (1, -1, 1) if tail else (-1,)
            # PEFT reads both names, the MLX runtime the second.
            key = f"{prefix}.lora_magnitude_vector" if port else f"{prefix}.lora_magnitude_vector.weight"
            tensors[key] = magnitude.reshape(shape).contiguous()
    return {part: (_peft_config(config, targets), tensors) for part, (targets, tensors) in parts.items()}


def port_name(name: str) -> tuple[str, str]:
    """(module, layer name in the port) of an adapter-relative layer name. Raises ConfigError if it has none."""
    if name == _DURATION_LAYER:
        return DURATION, "linear"
    if not name.startswith("model."):
        raise ConfigError(f"{name}: diffusers' port has no such layer; train without it (exclude) to use this format")
    target = name.removeprefix("model.")
    for pattern, replacement in _RENAMED:
        target, count = pattern.subn(replacement, target)
        if count:
            break
    for ours, theirs in _RENAMED_INSIDE:
        target = target.replace(ours, theirs)
    return TRANSFORMER, target


def reordered(name: str, rows: torch.Tensor, fan_in: int, back: bool = False) -> torch.Tensor:
    """``rows`` (O, ...) of a layer in the port's order; ``back`` converts from the port's order to ours."""
    blocks = len(_DIFFERENTIAL_ORDER)
    if not name.endswith("self_attn.to_qkv") or rows.shape[0] != blocks * fan_in:
        return rows
    parts = rows.chunk(blocks)
    order = [_DIFFERENTIAL_ORDER.index(i) for i in range(blocks)] if back else _DIFFERENTIAL_ORDER
    return torch.cat([parts[i] for i in order])


def _peft_config(config, targets: list[str]) -> dict:
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_dora": config.kind.rows,
        "lora_dropout": 0.0,
        "bias": "none",
        # A string is matched against whole names; a list would also match suffixes of names.
        "target_modules": "|".join(re.escape(target) for target in targets),
        "inference_mode": True,
    }
