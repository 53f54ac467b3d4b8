"""Adapter files: one safetensors file per adapter, in the format that Stable Audio 3's own inference loads.

Keys are ``<layer>.parametrizations.weight.0.<tensor>``, values float16, and the header's ``lora_config`` says what they
are. Any other header entry is a trainer's own and ignored by other readers.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch

from sa3dist.adapters.attach import SLOT, AdapterConfig
from sa3dist.adapters.foreign import what_instead
from sa3dist.data.remote.local_paths import expand_home
from sa3dist.errors import CheckpointError, ConfigError, EnvironmentFailure
from sa3dist.model.rewrite_safetensors import write_safetensors

CONFIG_KEY = "lora_config"
# Header entry holding base.weights_digest(); written by whoever saves, checked by warm_start.
BASE_KEY = "base_sha256"


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """A file as read: config with its defaults filled in, tensors by key, and the other header entries."""

    path: Path
    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def layers(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors of every layer by their names in the layer, in the file's order.

        Raises CheckpointError, naming the layer, when they are not those of the adapter type and of one another's
        shape. Whether they fit a base is not known here.
        """
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in self.tensors.items():
            name, slot, tensor = key.rpartition(f".{SLOT}.")
            if not slot:
                raise CheckpointError(f"{self.path}: {key} is no adapter tensor; expected <layer>.{SLOT}.<tensor>")
            layers.setdefault(name, {})[tensor] = value
        for name, tensors in layers.items():
            found = {tensor: tuple(value.shape) for tensor, value in tensors.items()}
            fan_out = (found.get("lora_B") or found.get(self.config.kind.row_magnitude) or (0,))[0]
            fan_in = (found.get("lora_A") or found.get(self.config.kind.col_magnitude) or (0,))[-1]
            expected = self.config.kind.parameter_shapes(fan_out, fan_in, self.config.rank)
            if found != expected:
                raise CheckpointError(f"{self.path}: {name} holds {found}, expected {expected}")
        return layers


def read_adapter_file(path: str | Path) -> AdapterFile:
    """Read and check a file by itself; whether it fits a base model is for ``load_adapter`` to say.

    Raises CheckpointError, naming the file, for what is no adapter file, a bad ``lora_config`` or non-finite values.
    """
    path = Path(expand_home(path))
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: {what_instead(path, error)}") from error
    for key, value in tensors.items():
        if not value.is_floating_point() or not value.float().isfinite().all():
            raise CheckpointError(
                f"{path}: {key} ({value.dtype}) holds values that are not finite floats; train it again"
            )
    try:
        config = _read_config(metadata.pop(CONFIG_KEY, None), tensors)
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {CONFIG_KEY} in the header is not valid: {error}") from error
    return AdapterFile(path, config, {key: _squeezed(key, value) for key, value in tensors.items()}, metadata)


def write_adapter_file(
    path: str | Path, config: AdapterConfig, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]
) -> None:
    """Write float32 tensors as float16, whole or not at all; equal contents give equal bytes.

    Raises EnvironmentFailure, naming the tensor and leaving any older file in place, for values that are empty, not
    finite, or beyond float16's range.
    """
    halves = publishable(tensors)
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    header[CONFIG_KEY] = json.dumps(config_value(config))
    write_safetensors(Path(expand_home(path)), halves, header)


def config_value(config: AdapterConfig) -> dict:
    """``lora_config`` in the reference's field order. Dropout is never applied, there or here."""
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "adapter_type": config.adapter_type,
        "dropout": 0.0,
        "include": None if config.include is None else list(config.include),
        "exclude": None if config.exclude is None else list(config.exclude),
    }


def config_from_value(value: Mapping) -> AdapterConfig:
    """The inverse of ``config_value``."""
    return AdapterConfig(value["rank"], value["alpha"], value["adapter_type"], value["include"], value["exclude"])


def _read_config(text: str | None, tensors: Mapping[str, torch.Tensor]) -> AdapterConfig:
    """The header's config; absent fields as inference fills them in: type lora, rank from a shape, alpha = rank."""
    value = {} if text is None else json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {text}")
    rank = value.get("rank")
    if rank is None:
        cores = [
            tensor.shape[0] for key, tensor in tensors.items() if key.endswith((".lora_A", ".M_xs")) and tensor.ndim
        ]
        if not cores:
            raise ValueError("no rank, and no lora_A or M_xs tensor to take it from; is this an adapter file?")
        rank = cores[0]
    alpha = value.get("alpha")
    adapter_type = value.get("adapter_type") or "lora"
    if adapter_type == "dora" and _first_magnitude_is_a_row(tensors):
        adapter_type = "dora-cols"
    alpha = rank if alpha is None else alpha
    return AdapterConfig(rank, alpha, adapter_type, value.get("include"), value.get("exclude"))


def _first_magnitude_is_a_row(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Early ``dora`` files kept 2-D magnitudes: (1, fan_in) for columns, (fan_out, 1) for rows."""
    first = next((value for key, value in tensors.items() if key.endswith(".magnitude")), None)
    return first is not None and first.ndim == 2 and first.shape[0] == 1


def _squeezed(key: str, value: torch.Tensor) -> torch.Tensor:
    legacy = key.endswith(".magnitude") and value.ndim == 2 and 1 in value.shape
    return value.reshape(-1) if legacy else value


def publishable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor as a file holds it, float16 on the CPU. Raises as ``write_adapter_file`` does."""
    halves = {key: value.detach().to("cpu", torch.float32).half().contiguous() for key, value in tensors.items()}
    for key, half in halves.items():
        if not half.numel():
            raise EnvironmentFailure(f"{key} is empty: its values are on another process; gather them before saving")
        if not half.isfinite().all():
            largest = tensors[key].abs().max().item()
            raise EnvironmentFailure(f"{key} holds {largest:g}, which float16 cannot: the adapter was not saved")
    return halves
