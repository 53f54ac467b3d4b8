"""The nine adapter types: attaching them by name, their effective weights, their file format."""

from sa3dist.adapters.attach import (
    AdapterConfig,
    adapted_layers,
    adapter_digest,
    adapter_parameters,
    attach_adapter,
    detach_adapter,
    effective_weight,
    set_strength,
    tensors_digest,
)
from sa3dist.adapters.file import BASE_KEY, AdapterFile, describe_adapter, read_adapter_file
from sa3dist.adapters.select import candidate_layers, select
from sa3dist.adapters.svd_bases import BasesCache
from sa3dist.adapters.transfer import load_adapter, lora_config, save_adapter, warm_start

__all__ = [
    "BASE_KEY",
    "AdapterConfig",
    "AdapterFile",
    "BasesCache",
    "adapted_layers",
    "adapter_digest",
    "adapter_parameters",
    "attach_adapter",
    "candidate_layers",
    "describe_adapter",
    "detach_adapter",
    "effective_weight",
    "load_adapter",
    "lora_config",
    "read_adapter_file",
    "save_adapter",
    "select",
    "set_strength",
    "tensors_digest",
    "warm_start",
]
