"""Finds and loads a base model by its released name or directory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torch import nn

from sa3dist.data.remote.local_paths import expand_home
from sa3dist.errors import CheckpointError
from sa3dist.model.base import AUTOENCODER_PREFIX, CONDITIONER_PREFIX, MODEL_PREFIX, Base, weight_key, wrapped
from sa3dist.model.checkpoint import CheckpointFile, check_keys, tensor_shapes
from sa3dist.model.conditioners import Conditioners
from sa3dist.model.config import ModelConfig
from sa3dist.model.dit import DiT
from sa3dist.model.hub import hub_file
from sa3dist.model.parse_config import parse_model_config, read_model_config
from sa3dist.model.released import RELEASED, released_config
from sa3dist.model.same import Autoencoder
from sa3dist.model.text import TextSource
from sa3dist.runtime.nameless_user import keep_caches_without_a_name

CONFIG_NAME = "model_config.json"
WEIGHTS_NAME = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class BaseFiles:
    """Where one base's files are. ``directory`` is set for a local base, ``repo_id`` for a released one."""

    config: Path
    weights: Path
    directory: Path | None = None
    repo_id: str | None = None


def find_base(name_or_directory: str | Path) -> BaseFiles:
    """The files of a released name (from the cache or the hub) or of a directory. Raises CheckpointError."""
    name = str(name_or_directory)
    if name in RELEASED:
        repo_id = RELEASED[name]
        return BaseFiles(hub_file(repo_id, CONFIG_NAME), hub_file(repo_id, WEIGHTS_NAME), repo_id=repo_id)
    directory = _existing_directory(name)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory}: no {file}; expected {CONFIG_NAME} and {WEIGHTS_NAME} side by side")
    return BaseFiles(directory / CONFIG_NAME, directory / WEIGHTS_NAME, directory=directory)


def _existing_directory(name: str) -> Path:
    directory = Path(expand_home(name))
    if not os.path.isdir(directory):
        known = ", ".join(RELEASED)
        raise CheckpointError(
            f"model={name}: no such directory, and not a released base ({known}); give the path of its directory"
        )
    return directory


def known_config(name_or_directory: str | Path) -> ModelConfig:
    """The parsed config of a released name, without asking the hub, or of a directory. Weights are not read.

    Raises CheckpointError.
    """
    name = str(name_or_directory)
    if name in RELEASED:
        return parse_model_config(released_config(name), name)
    path = _existing_directory(name) / CONFIG_NAME
    return parse_model_config(read_model_config(path), str(path))


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key of ``model.safetensors`` with its shape, derived from the config."""
    with torch.device("meta"):
        return {
            **tensor_shapes(wrapped(DiT(config.dit)), MODEL_PREFIX),
            **tensor_shapes(Conditioners(config), CONDITIONER_PREFIX),
            **tensor_shapes(Autoencoder(config.autoencoder), AUTOENCODER_PREFIX),
        }


def meta_roots(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """The modules that hold adapter layers, on the meta device: names and shapes, no values."""
    with torch.device("meta"):
        return wrapped(DiT(config.dit)), Conditioners(config)


@dataclasses.dataclass(frozen=True)
class BaseOnDisk:
    """A base checked as strictly as by ``load_base`` but not loaded; tensors are read one by one."""

    files: BaseFiles
    config: ModelConfig
    weights: CheckpointFile

    @classmethod
    def open(cls, name_or_directory: str | Path) -> BaseOnDisk:
        """Raises CheckpointError as ``load_base`` does."""
        files = find_base(name_or_directory)
        config = parse_model_config(read_model_config(files.config), str(files.config))
        weights = CheckpointFile(files.weights)
        check_keys(expected_tensors(config), weights.shapes, files.weights)
        return cls(files, config, weights)

    @property
    def adapter_roots(self) -> tuple[nn.Module, nn.Module]:
        """As ``Base.adapter_roots``, on the meta device."""
        return meta_roots(self.config)

    def fp32_weight(self, name: str) -> torch.Tensor:
        """A layer's weight in float32 on the CPU, by adapter-relative layer name."""
        return self.weights.read(weight_key(name), None, "cpu", torch.float32)


def load_base(
    name_or_directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    text_encoder: str | Path | None = None,
    encoder: bool = True,
) -> Base:
    """Load a base model strictly by the official keys.

    name_or_directory  small-music-base, small-sfx-base, medium-base, or a directory with model_config.json and
                       model.safetensors
    text_encoder       where T5Gemma is, if not in the model's directory
    encoder            False leaves the SAME encoder on disk until audio is encoded (training on cached latents)
    Tensors are converted to ``device`` and ``dtype`` one by one. Raises CheckpointError if a file is missing or
    damaged, a key is missing, unexpected or of the wrong shape, or the config is unsupported.
    """
    keep_caches_without_a_name()
    on_disk = BaseOnDisk.open(name_or_directory)
    source = TextSource(
        on_disk.config.prompt,
        override=None if text_encoder is None else str(text_encoder),
        model_directory=on_disk.files.directory,
        base_repo=on_disk.files.repo_id,
    )
    return Base(on_disk.config, on_disk.weights, device, dtype, source, encoder)
