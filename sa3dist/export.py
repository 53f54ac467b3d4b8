"""Stage four: the trained adapter becomes the files a user takes away."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sa3dist.adapters import AdapterConfig
from sa3dist.adapters.file import config_from_value, write_adapter_file
from sa3dist.adapters.header import extras, header
from sa3dist.errors import CheckpointError
from sa3dist.formats import RESULT_NAME, RUN_CONFIG_NAME, write_json
from sa3dist.publishing.files import LORA_NAME, write_beside
from sa3dist.runtime import lease
from sa3dist.training.checkpoint import Checkpoint

log = logging.getLogger(__name__)

# Released models that take the adapters of a base: the base itself and its post-trained sibling.
INFERENCE_MODELS = {
    "medium-base": ["medium-base", "medium"],
    "small-music-base": ["small-music-base", "small-music"],
    "small-sfx-base": ["small-sfx-base", "small-sfx"],
}


def publish(
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    output_dir: Path,
    description: dict[str, Any],
    ended_early: str = "",
) -> dict[str, Any]:
    """Write lora.safetensors, config.json, result.json and the card, each by rename. Returns the result.

    tensors       whole adapter tensors by their name in the file
    description   content of config.json; ``header`` puts part of it into the adapter file's header
    ended_early   why the training ended before its last step, for the result; empty if it did not
    Raises EnvironmentFailure, naming the tensor and keeping any older file, when a tensor is empty or not finite.
    """
    output_dir = Path(output_dir)
    lease.end_if_over()
    write_adapter_file(output_dir / LORA_NAME, config, tensors, header(description), extras(description))
    models = INFERENCE_MODELS.get(description["base_model"], [description["base_model"]])
    write_json(output_dir / RUN_CONFIG_NAME, {**description, "inference_models": models})
    result = {
        "lora_file": _describe_file(output_dir / LORA_NAME, "application/octet-stream"),
        "config_file": _describe_file(output_dir / RUN_CONFIG_NAME, "application/json"),
    }
    if ended_early:
        result["ended_early"] = ended_early
    write_json(output_dir / RESULT_NAME, result)
    try:
        write_beside(output_dir)
    except OSError as failure:
        # The adapter is written; the card can be made later.
        reason = failure.strerror or failure
        log.warning("%s: no card beside the adapter (%s); sa3dist publish writes it", output_dir, reason)
    return result


def publish_saved(saved: Checkpoint, output_dir: Path) -> dict[str, Any]:
    """As ``publish``, from a checkpoint alone: what the run itself would have published at that step.

    Raises CheckpointError when the checkpoint holds no description of its run.
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
