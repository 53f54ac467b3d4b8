"""Experimental: an adapter in the formats that ComfyUI's generic loader patches a model with.

Per layer of the diffusion model, ``diffusion_model.<layer>.`` followed by

    lora_up.weight (O, R), lora_down.weight (R, I), alpha     V = W + alpha / R * up @ down
    dora_scale (O, 1)     W' = V * dora_scale / (norms of W's rows + eps)
    dora_scale (1, I)     W' = V * dora_scale / (norms of V's columns + eps)
    diff                  W' = W + diff

with eps of float32. Source: ComfyUI, comfy/lora.py and comfy/weight_adapter at v0.3.77 and later. Its rows are divided
by the norms of the weight before the update, ours by those after it: the quotient of the two, which is of this adapter
over this base, goes into dora_scale. Its columns are divided as ours are. Everything holds at strength 1; at other
strengths ComfyUI mixes W and W', where we scale the update inside the norms.

Legend: O fan_out, I fan_in, R rank.
"""

from collections.abc import Callable

import torch
from sa3dist_kernels.weight_norms import EPS as NORM_EPS

from sa3dist.adapters.file import AdapterFile
from sa3dist.adapters.lazy_file import AdapterOnDisk
from sa3dist.errors import ConfigError

# torch.finfo(torch.float32).eps, which the loader adds to its norms.
EPS = torch.finfo(torch.float32).eps


def to_comfy(file: AdapterFile, base: Callable[[], AdapterOnDisk]) -> dict[str, torch.Tensor]:
    """Low-rank format of lora and the DoRA types that scale rows or columns; -xs types as factors of their update.

    base   gives the adapter over its base, needed for all but lora and dora-cols
    Raises ConfigError for bora types, which scale both.
    """
    kind = file.config.kind
    if kind.rows and kind.cols:
        raise ConfigError(
            f"{file.path}: ComfyUI's dora_scale is of rows or of columns, {kind.name} has both; use --format comfy-diff"
        )
    adapter = base() if kind.rows or kind.xs else None
    tensors = {}
    layers = file.layers()
    for name, target in _targets(file).items():
        trained = layers[name]
        up, down = adapter.factors(name) if adapter and kind.xs else (trained["lora_B"], trained["lora_A"])
        tensors[f"{target}.lora_up.weight"], tensors[f"{target}.lora_down.weight"] = up, down.contiguous()
        tensors[f"{target}.alpha"] = torch.tensor(float(file.config.alpha))
        if kind.rows:
            tensors[f"{target}.dora_scale"] = _row_scale(adapter, name)
        elif kind.cols:
            shape = (1, -1, 1) if _is_convolution(name) else (1, -1)
            tensors[f"{target}.dora_scale"] = trained[kind.col_magnitude].reshape(shape)
    return tensors


def to_comfy_diff(adapter: AdapterOnDisk) -> dict[str, torch.Tensor]:
    """Full changes W' - W of every layer, float16: as large as the adapted part of the model, for any type."""
    return {
        f"{target}.diff": (adapter.effective_weight(name) - adapter.base.fp32_weight(name)).half()
        for name, target in _targets(adapter.file).items()
    }


def left_out(file: AdapterFile) -> list[str]:
    """Adapted layers that ComfyUI holds outside of its diffusion model, where no adapter file reaches them."""
    return [name for name in file.layers() if not name.startswith("model.")]


def _targets(file: AdapterFile) -> dict[str, str]:
    names = [name for name in file.layers() if name.startswith("model.")]
    if not names:
        raise ConfigError(f"{file.path}: changes no layer of the diffusion model, so there is nothing for ComfyUI")
    return {name: f"diffusion_model.{name.removeprefix('model.')}" for name in names}


def _row_scale(adapter: AdapterOnDisk, name: str) -> torch.Tensor:
    """What the loader has to multiply row by row, in the shape it broadcasts: (O, 1), or (O, 1, 1) of a convolution."""
    before_O = torch.linalg.vector_norm(adapter.base.fp32_weight(name).flatten(1), dim=1)
    magnitude = adapter.trained(name)[adapter.kind.row_magnitude]
    scale = magnitude * (before_O + EPS) / (adapter.row_norms(name) + NORM_EPS)
    return scale.reshape((-1, 1, 1) if _is_convolution(name) else (-1, 1))


def _is_convolution(name: str) -> bool:
    return name.endswith("_conv")
