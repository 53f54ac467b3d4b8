"""Adapter files: one safetensors file per adapter, in the format that Stable Audio 3's own inference loads.

Keys are ``<layer>.parametrizations.weight.0.<tensor>``, values are float16, and ``lora_config`` in the header holds the
adapter's settings. Readers ignore other header entries, which each trainer defines.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch

from sa3dist.adapters.attach import SLOT, AdapterConfig
from sa3dist.adapters.foreign import guess, is_checkpoint, read_checkpoint, what_instead
from sa3dist.adapters.layouts import PEFT_WEIGHTS, is_foreign, peft_folders, read_peft_config, to_native
from sa3dist.data.remote.local_paths import expand_home
from sa3dist.errors import CheckpointError, ConfigError, EnvironmentFailure
from sa3dist.formats import RUN_CONFIG_NAME
from sa3dist.model.rewrite_safetensors import write_safetensors

CONFIG_KEY = "lora_config"
# Fields of lora_config beyond the adapter's settings, for programs that read nothing else of the header.
EXTRA_KEYS = ("step", "epoch", "base_model", "baked_norms", "norm_base")
# Precomputed float32 row norms of a DoRA: read from any file, never written by a run.
BAKED = "baked_vnorm_row"
# Header entry with base.weights_digest(); checked by ``warm_start``.
BASE_KEY = "base_sha256"


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """A file as read: config with defaults filled in, tensors by key, and the other header entries.

    baked     precomputed norms of the rows of W0 + scale * D by layer, if the file has them
    foreign   whether the file has another trainer's layout
    of_run    the base of its run, if the adapter was read from a run's state
    """

    path: Path
    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    baked: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    foreign: bool = False
    of_run: str | None = None

    @property
    def base(self) -> str | None:
        """The base it was trained on, as for ``load_base``; None if unknown."""
        return self.of_run or base_of(self.path, self.metadata)

    def layers(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors by layer and name, in the file's order.

        Raises CheckpointError, naming the layer, if tensors do not fit the adapter type or one another. Does not check
        them against a base.
        """
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in self.tensors.items():
            name, slot, tensor = key.rpartition(f".{SLOT}.")
            if not slot:
                raise CheckpointError(f"{self.path}: {key} is no adapter tensor; expected <layer>.{SLOT}.<tensor>")
            layers.setdefault(name, {})[tensor] = value
        for name, tensors in layers.items():
            shapes = {tensor: tuple(value.shape) for tensor, value in tensors.items()}
            fan_out = (shapes.get("lora_B") or shapes.get(self.config.kind.row_magnitude) or (0,))[0]
            fan_in = (shapes.get("lora_A") or shapes.get(self.config.kind.col_magnitude) or (0,))[-1]
            expected = self.config.kind.parameter_shapes(fan_out, fan_in, self.config.rank)
            if shapes != expected:
                raise CheckpointError(f"{self.path}: {name} holds {shapes}, expected {expected}")
        return layers


def read_adapter_file(path: str | Path, lora_config: str | None = None) -> AdapterFile:
    """Read and check a file; ``load_adapter`` checks whether it fits a base.

    path          safetensors file or PyTorch checkpoint of this format, or a file or PEFT folder of another trainer
    lora_config   JSON to use instead of the header's
    Raises CheckpointError, naming the file, if it is no adapter file, has a bad ``lora_config`` or non-finite values.
    """
    path = Path(expand_home(path))
    weights = [weights_in(folder) for folder in peft_folders(path)] or [path]
    contents = [read_tensors(file) for file in weights]
    if any(is_foreign(tensors) for tensors, _ in contents):
        parts = [(tensors, read_peft_config(file)) for file, (tensors, _) in zip(weights, contents, strict=True)]
        return AdapterFile(path, *to_native(path, parts), contents[0][1], foreign=True)
    [(tensors, metadata)] = contents
    header_config = metadata.pop(CONFIG_KEY, None)
    try:
        config = _read_config(lora_config or header_config, tensors)
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {CONFIG_KEY} in the header is not valid: {error}") from error
    baked = {key.removesuffix(f".{SLOT}.{BAKED}"): tensors.pop(key) for key in list(tensors) if key.endswith(BAKED)}
    return AdapterFile(path, config, {key: _squeezed(key, value) for key, value in tensors.items()}, metadata, baked)


def base_of(path: Path, metadata: Mapping[str, str]) -> str | None:
    """The base named by the header of the file at ``path``; for a directory its full path, if known.

    The header holds only the directory's name, because files are shared; config.json beside the file has the path.
    """
    name = metadata.get("base_model")
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        about = json.loads((path.parent / RUN_CONFIG_NAME).read_text(encoding="utf-8"))
        if about[BASE_KEY] == metadata.get(BASE_KEY):
            return about["base_model"]
    return name


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and header entries of a safetensors file or PyTorch checkpoint. Raises CheckpointError."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (OSError, safetensors.SafetensorError) as error:
        if not is_checkpoint(path):
            raise CheckpointError(f"{path}: {what_instead(path, error)}") from error
        tensors, metadata = read_checkpoint(path)
    for key, value in tensors.items():
        if not value.is_floating_point() or not value.float().isfinite().all():
            raise CheckpointError(
                f"{path}: {key} ({value.dtype}) holds values that are not finite floats; train it again"
            )
    return tensors, metadata


def weights_in(folder: Path) -> Path:
    """The file with the tensors of a PEFT folder."""
    return next((folder / name for name in PEFT_WEIGHTS if (folder / name).is_file()), folder / PEFT_WEIGHTS[0])


def write_adapter_file(
    path: str | Path,
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, object],
    extras: Mapping[str, object] | None = None,
    baked: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write float32 tensors as float16, atomically; equal contents give equal bytes.

    extras   fields of EXTRA_KEYS, written after the adapter's settings in ``lora_config``
    baked    row norms by layer, written as float32
    Raises EnvironmentFailure, naming the tensor and leaving any older file in place, for tensors that are empty, not
    finite, or beyond float16's range.
    """
    halves = publishable(tensors)
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    header[CONFIG_KEY] = json.dumps({**config_value(config), **(extras or {})})
    norms = {f"{name}.{SLOT}.{BAKED}": value for name, value in (baked or {}).items()}
    write_safetensors(Path(expand_home(path)), {**halves, **norms}, header)


def config_value(config: AdapterConfig) -> dict:
    """``lora_config`` in the reference's field order. Neither the reference nor we apply dropout."""
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
    """The header's config, with inference's defaults: type lora, rank from a shape, alpha = rank."""
    value = {} if text is None else json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {text}")
    magnitude = next((key for key in tensors if text is None and ".magnitude" in key), None)
    if magnitude:
        raise ValueError(
            f"there is none, and {magnitude} is not of a plain lora, which such files are; say what it is: sa3dist "
            f"export FILE --format native --lora-config '{json.dumps(guess(tensors))}', with the alpha of its training"
        )
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
    """Early ``dora`` files have 2-D magnitudes: (1, fan_in) for columns, (fan_out, 1) for rows."""
    first = next((value for key, value in tensors.items() if key.endswith(".magnitude")), None)
    return first is not None and first.ndim == 2 and first.shape[0] == 1


def _squeezed(key: str, value: torch.Tensor) -> torch.Tensor:
    legacy = key.endswith((".magnitude", ".magnitude_r", ".magnitude_c")) and value.ndim == 2 and 1 in value.shape
    return value.reshape(-1) if legacy else value


def publishable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors as written to a file, float16 on the CPU. Raises as ``write_adapter_file`` does."""
    halves = {key: value.detach().to("cpu", torch.float32).half().contiguous() for key, value in tensors.items()}
    for key, half in halves.items():
        if not half.numel():
            raise EnvironmentFailure(f"{key} is empty: its values are on another process; gather them before saving")
        if not half.isfinite().all():
            largest = tensors[key].abs().max().item()
            raise EnvironmentFailure(f"{key} holds {largest:g}, which float16 cannot: the adapter was not saved")
    return halves
