"""Loads, warm-starts and saves the adapter of a base model; a missing or unexpected tensor is an error."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from sa3dist.adapters.attach import (
    SLOT,
    adapted_layers,
    adapter_parameters,
    attach_to,
    check_strength,
    set_strength,
)
from sa3dist.adapters.file import BAKED, BASE_KEY, AdapterFile, config_value, read_adapter_file, write_adapter_file
from sa3dist.adapters.select import candidate_layers, select
from sa3dist.errors import CheckpointError, ConfigError
from sa3dist.model.base import Base
from sa3dist.model.checkpoint import differences


def load_adapter(base: Base, path: str | Path, strength: float = 1.0) -> None:
    """Attach the adapter in ``path`` and set its strength.

    If an adapter is attached already, its values are replaced; its type, rank, alpha and pattern lists must equal the
    file's. Raises CheckpointError if they do not, and for any missing, unexpected or misshapen tensor, which the
    reference's loader ignores. ``base`` is unchanged if it raises.
    """
    load_adapter_file(base, read_adapter_file(path), strength)


def load_adapter_file(base: Base, file: AdapterFile, strength: float = 1.0) -> None:
    """``load_adapter`` for a file already read."""
    check_strength(strength)
    if adapted_layers(base):
        _require_agreement(base, file)
        require_tensors({key: value.shape for key, value in adapter_parameters(base).items()}, file)
    else:
        names = list(covered_layers(file, base.adapter_roots))
        try:
            # The seed does not matter: all trained values come from the file.
            attach_to(base, file.config, names, seed=0)
        except ConfigError as error:
            raise CheckpointError(f"{file.path}: {error}") from error
    _copy_values(base, file)
    set_strength(base, strength)


def warm_start(base: Base, path: str | Path) -> None:
    """Start the attached adapter from the values in ``path``.

    Raises CheckpointError, naming the field and both values, if the file's type, rank, alpha or pattern lists differ
    from the attached adapter's or its header has another base's hash; and for tensors that do not match.
    """
    if not adapted_layers(base):
        raise ConfigError("warm_start needs an attached adapter; attach_adapter(base, ...) first")
    file = read_adapter_file(path)
    _require_agreement(base, file)
    if BASE_KEY in file.metadata and file.metadata[BASE_KEY] != base.weights_digest():
        raise CheckpointError(
            f"{file.path}: {BASE_KEY} is {file.metadata[BASE_KEY]}, this base has {base.weights_digest()}; "
            "the adapter was trained on another base model"
        )
    require_tensors({key: value.shape for key, value in adapter_parameters(base).items()}, file)
    _copy_values(base, file)


def save_adapter(base: Base, path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Write the attached adapter, float16, whole or not at all; equal adapters and metadata give equal bytes.

    metadata  more header entries, written as strings; ``base_sha256`` (base.weights_digest()) is checked by warm_start
    Raises ConfigError without an attached adapter, and EnvironmentFailure, naming the tensor and leaving any older file
    in place, for values that are empty, not finite, or beyond float16's range.
    """
    parameters = adapter_parameters(base)
    if not parameters:
        raise ConfigError("there is no adapter to save; attach_adapter(base, ...) first")
    write_adapter_file(path, base.adapter_config, parameters, metadata or {})


def lora_config(base: Base) -> dict:
    """The attached adapter's ``lora_config``, in the reference's field order. Raises ConfigError if there is none."""
    if not adapted_layers(base):
        raise ConfigError("no adapter is attached; attach_adapter(base, ...) first")
    return config_value(base.adapter_config)


def _require_agreement(base: Base, file: AdapterFile) -> None:
    attached = base.adapter_config
    adapted = list(adapted_layers(base))
    names = [*adapted, *candidate_layers(base.adapter_roots)]
    # Compare the selected layers, not the lists: other trainers' files list layers one by one.
    lists = () if adapted == select(names, file.config.include, file.config.exclude) else ("include", "exclude")
    for field in ("adapter_type", "rank", "alpha", *lists):
        ours, theirs = getattr(attached, field), getattr(file.config, field)
        # "dora" is another name of dora-rows.
        same = attached.kind.computes_as(file.config.kind) if field == "adapter_type" else ours == theirs
        if not same:
            raise CheckpointError(
                f"{file.path}: {field} is {theirs!r} in the file, {ours!r} in the attached adapter; "
                f"an adapter is continued under the file's own {field}"
            )


def covered_layers(file: AdapterFile, roots: Iterable[torch.nn.Module]) -> dict[str, torch.nn.Linear | torch.nn.Conv1d]:
    """The layers under ``roots`` that the file's pattern lists select, by name.

    Raises CheckpointError if there is none, or if the file's tensors do not fit them.
    """
    candidates = candidate_layers(roots)
    layers = {name: candidates[name] for name in select(candidates, file.config.include, file.config.exclude)}
    if not layers:
        raise CheckpointError(f"{file.path}: its include and exclude lists select no layer of this base model")
    config = file.config
    shapes = {
        f"{name}.{SLOT}.{tensor}": shape
        for name, layer in layers.items()
        for tensor, shape in config.kind.parameter_shapes(*layer.weight.flatten(1).shape, config.rank).items()
    }
    require_tensors(shapes, file)
    return layers


def require_tensors(expected: Mapping[str, Iterable[int]], file: AdapterFile) -> None:
    """Raises CheckpointError naming up to three tensors that are missing, unexpected or of the wrong shape."""
    if problems := differences(expected, {key: value.shape for key, value in file.tensors.items()}):
        raise CheckpointError(
            f"{file.path}: of the {len(expected)} tensors this base model and the file's lora_config ask for, "
            f"{problems}"
        )
    for name, norms in file.baked.items():
        rows = expected.get(f"{name}.{SLOT}.{file.config.kind.row_magnitude}", ())
        if tuple(norms.shape) != tuple(rows):
            raise CheckpointError(
                f"{file.path}: {name}.{SLOT}.{BAKED} is {list(norms.shape)}, expected {list(rows)} of a "
                f"{file.config.adapter_type} over this base; bake them again: sa3dist export FILE --baked-norms"
            )


@torch.no_grad()
def _copy_values(base: Base, file: AdapterFile) -> None:
    for key, parameter in adapter_parameters(base).items():
        parameter.copy_(file.tensors[key])
