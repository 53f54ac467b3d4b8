"""The nine adapter types on a base: attaching, effective weights and files."""

from sa3dist.adapters.attach import (
    AdapterConfig,
    adapted_layers,
    adapter_parameters,
    attach_adapter,
    bake_adapter,
    detach_adapter,
    effective_weight,
    formed_once,
    set_strength,
)
from sa3dist.adapters.file import BASE_KEY, AdapterFile, read_adapter_file
from sa3dist.adapters.select import candidate_layers, select
from sa3dist.adapters.svd_bases import BasesCache
from sa3dist.adapters.transfer import load_adapter, load_adapter_file, lora_config, save_adapter, warm_start

__all__ = [
    "BASE_KEY",
    "AdapterConfig",
    "AdapterFile",
    "BasesCache",
    "adapted_layers",
    "adapter_parameters",
    "attach_adapter",
    "bake_adapter",
    "candidate_layers",
    "detach_adapter",
    "effective_weight",
    "formed_once",
    "load_adapter",
    "load_adapter_file",
    "lora_config",
    "read_adapter_file",
    "save_adapter",
    "select",
    "set_strength",
    "warm_start",
]
