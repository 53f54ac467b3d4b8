"""What PEFT's own loader loads of adapter folders, over the model under our names or diffusers' port.

Modules are on the meta device; each layer gets its weight only while it is compared.
"""

import functools
import importlib.util
import warnings
from pathlib import Path

import torch
from torch import nn

from sa3dist.adapters.file import read_adapter_file, read_tensors, weights_in
from sa3dist.adapters.landing import Landing
from sa3dist.adapters.layouts import PEFT_PREFIX, peft_folders, split_key
from sa3dist.adapters.lazy_file import AdapterOnDisk
from sa3dist.adapters.peft_format import DURATION, TRANSFORMER, port_name, reordered
from sa3dist.adapters.select import candidate_layers
from sa3dist.errors import CheckpointError
from sa3dist.model.loading import BaseOnDisk


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def peft(path: Path, base: BaseOnDisk) -> Landing:
    """One folder, over the diffusion model and number conditioner under our names."""
    network, conditioners = base.adapter_roots
    whole = nn.ModuleDict({**network._modules, **conditioners._modules})
    return _land(path, base, {path: whole}, {(path, name): name for name in candidate_layers([whole])}, ("peft",))


def diffusers(path: Path, base: BaseOnDisk) -> Landing:
    """One folder per module of diffusers' port that the adapter covers."""
    names = {}
    for name in candidate_layers(base.adapter_roots):
        part, target = port_name(name)
        names[path / part, target] = name
    modules = _port(base) if installed("diffusers") else {}
    parts = {path / part: module for part, module in modules.items()}
    return _land(path, base, parts, names, ("peft", "diffusers"))


def _port(base: BaseOnDisk) -> dict[str, nn.Module]:
    from diffusers import StableAudio3DiTModel
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    config = base.config.dit
    with torch.device("meta"):
        return {
            TRANSFORMER: StableAudio3DiTModel(
                io_channels=config.io_channels,
                embed_dim=config.embed_dim,
                depth=config.depth,
                num_heads=config.num_heads,
                cond_token_dim=config.cond_token_dim,
                global_cond_dim=config.global_cond_dim,
                local_add_cond_dim=config.local_add_cond_dim,
                ff_mult=config.ff_kwargs.mult,
                num_memory_tokens=config.num_memory_tokens,
                use_differential_attention=config.attn_kwargs.differential,
            ),
            DURATION: StableAudio3DurationEmbedder(output_dim=base.config.cond_dim),
        }


def _land(
    path: Path,
    base: BaseOnDisk,
    modules: dict[Path, nn.Module],
    names: dict[tuple[Path, str], str],
    packages: tuple[str, ...],
) -> Landing:
    """What lands of the folders at ``path``. names: (folder, the program's layer name) -> our layer name."""
    folders = peft_folders(path)
    if not folders:
        raise CheckpointError(
            f"{path}: is no PEFT folder, with adapter_config.json in it; sa3dist export FILE makes one"
        )
    landing = Landing()
    loaded = installed(*packages)
    own = None if loaded else AdapterOnDisk(read_adapter_file(path), base)
    for folder in folders:
        keys = read_tensors(weights_in(folder))[0]
        passed_over = set()
        if loaded and folder in modules:
            module, passed_over = _load(folder, modules[folder])
        for layer in dict.fromkeys([*(split_key(key)[0] for key in keys), *sorted(passed_over)]):
            target = layer.removeprefix(PEFT_PREFIX)
            name = names.get((folder, target))
            if name is None or not layer.startswith(PEFT_PREFIX) or layer in passed_over:
                landing.missed[name or layer] = (
                    f"{layer} of {folder.name} is passed over: no such layer, or another shape"
                )
            elif own:
                landing.weights[name] = lambda _, name=name: own.effective_weight(name)
            else:
                landing.weights[name] = functools.partial(_merged_by_peft, module, target, name)
    return landing


def _load(folder: Path, module: nn.Module) -> tuple[nn.Module, set[str]]:
    """The module with PEFT's layers inside, and the layers of the folder that PEFT passed over."""
    from peft import PeftConfig, PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Nothing is written to the weights, so no memory is used.
            model = PeftModel(module.to_empty(device="cpu"), PeftConfig.from_pretrained(str(folder)))
            result = model.load_adapter(str(folder), "default", ignore_mismatched_sizes=True)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: PEFT refuses it ({reason}); export the adapter again") from error
    keys = [key.replace(".default", "") for key in (*result.missing_keys, *result.unexpected_keys)]
    return model.base_model.model, {split_key(key)[0] for key in keys}


def _merged_by_peft(module: nn.Module, target: str, name: str, weight: torch.Tensor) -> torch.Tensor:
    layer = module.get_submodule(target)
    own, fan_in, of_port = layer.get_base_layer(), weight.shape[1], target != name
    empty, own.weight = own.weight, nn.Parameter(reordered(name, weight, fan_in) if of_port else weight)
    layer.merge()
    merged, own.weight = own.weight.detach(), empty
    return reordered(name, merged, fan_in, back=True) if of_port else merged
