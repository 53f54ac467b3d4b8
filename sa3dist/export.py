"""Stage four: the trained adapter becomes the files a user takes away."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sa3dist.adapters import AdapterConfig
from sa3dist.adapters.file import EXTRA_KEYS, config_from_value, write_adapter_file
from sa3dist.errors import CheckpointError
from sa3dist.formats import write_json
from sa3dist.publishing.files import CONFIG_NAME, LORA_NAME, write_beside
from sa3dist.runtime import lease
from sa3dist.training.checkpoint import Checkpoint

RESULT_NAME = "result.json"
# Which released models take the adapters of a base: the base itself and its post-trained sibling.
INFERENCE_MODELS = {
    "medium-base": ["medium-base", "medium"],
    "small-music-base": ["small-music-base", "small-music"],
    "small-sfx-base": ["small-sfx-base", "small-sfx"],
}
# ModelSpec's names of what takes one file: a base and its post-trained sibling are one.
ARCHITECTURES = {
    "medium-base": "stable-audio-3-medium",
    "small-music-base": "stable-audio-3-small",
    "small-sfx-base": "stable-audio-3-small",
}
HEADER_KEYS = ("step", "epoch", "base_model", "base_sha256", "dataset_sha256", "sa3dist_version")


def publish(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], output_dir: Path, description: dict[str, Any]
) -> dict[str, Any]:
    """Write lora.safetensors, config.json, result.json and the card, each by rename. Returns the result.

    tensors       whole adapter tensors by their name in the file
    description   what config.json holds; ``header`` of it goes into the adapter file's header
    Raises EnvironmentFailure, naming the tensor and leaving any older file, when one is empty or not finite.
    """
    output_dir = Path(output_dir)
    lease.end_if_over()
    extras = {key: description[key] for key in EXTRA_KEYS if key in description}
    write_adapter_file(output_dir / LORA_NAME, config, tensors, header(description), extras)
    models = INFERENCE_MODELS.get(description["base_model"], [description["base_model"]])
    write_json(output_dir / CONFIG_NAME, {**description, "inference_models": models})
    result = {
        "lora_file": _describe_file(output_dir / LORA_NAME, "application/octet-stream"),
        "config_file": _describe_file(output_dir / CONFIG_NAME, "application/json"),
    }
    write_json(output_dir / RESULT_NAME, result)
    write_beside(output_dir)
    return result


def header(description: dict[str, Any]) -> dict[str, str]:
    """The entries of an adapter file's header that say what it is, ModelSpec 1.0.1 among them, all as text.

    Without ModelSpec's date: equal adapters are equal files. Its hash is added where the file is written.
    Source: github.com/Stability-AI/ModelSpec.
    """
    base = description.get("base_model", "")
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{ARCHITECTURES.get(base, 'stable-audio-3')}/lora",
        "implementation": "https://github.com/Stability-AI/stable-audio-3",
        "title": description.get("settings", {}).get("name", "sa3dist-lora"),
        "description": f"Adapter of Stable Audio 3 ({Path(base).name}) after {description.get('step')} steps",
        "license": "Stability AI Community License, https://stability.ai/license",
    }
    own = {key: description[key] for key in HEADER_KEYS if key in description}
    return {key: str(value) for key, value in {**own, **{f"modelspec.{key}": spec[key] for key in spec}}.items()}


def publish_saved(saved: Checkpoint, output_dir: Path) -> dict[str, Any]:
    """As ``publish``, of a checkpoint alone: what the run itself would have published at that step.

    Raises CheckpointError when it was saved without its run's description.
    """
    description = saved.state.get("description")
    if not description:
        raise CheckpointError(
            f"{output_dir}: the checkpoint of step {saved.step} holds no description of its run, an older version "
            f"saved it; sa3dist train CONFIG exports it at the end of the run"
        )
    config = config_from_value(description["lora_config"])
    return publish(config, saved.adapters, output_dir, {**description, "step": saved.step})


def _describe_file(path: Path, content_type: str) -> dict[str, Any]:
    return {
        "url": path.resolve().as_uri(),
        "content_type": content_type,
        "file_name": path.name,
        "file_size": path.stat().st_size,
    }
