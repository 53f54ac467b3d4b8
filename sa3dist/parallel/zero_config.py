"""The launcher's DeepSpeed configuration: found, checked against the run's settings, completed for the engine.

The file says how memory is divided. Batch sizes, optimiser, schedule and precision are the run's own settings: the file
leaves them out or says "auto"; where it asks for something else it is refused, and 16-bit training is turned off.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

import sa3dist
from sa3dist.errors import ConfigError

log = logging.getLogger(__name__)

FILE_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
USE_VARIABLE = "ACCELERATE_USE_DEEPSPEED"
# What would hold adapters, gradients or moments in 16 bits, or autocast a second time.
HALF_PRECISION = ("fp16", "bf16", "amp", "torch_autocast")
# Who decides instead of the file.
OURS = {
    "optimizer": "AdamW is set by learning_rate and weight_decay",
    "scheduler": "the learning rate is set by learning_rate and its schedule",
    "communication_data_type": "it is set by gradient_compression",
    "data_types": "gradients are float32",
}


def asked_for() -> bool:
    """Whether the launcher started this process for DeepSpeed."""
    return os.environ.get(USE_VARIABLE, "").lower() in {"1", "true", "yes"}


def prepare_environment(on_cpu: bool) -> None:
    """What Accelerate and DeepSpeed read when this process joins the others. Raises ConfigError."""
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(f"{USE_VARIABLE} is set, but DeepSpeed needs a launcher: accelerate launch or torchrun")
    _find_file()
    if on_cpu:
        if torch.cuda.is_available():
            raise ConfigError(
                "DeepSpeed uses the GPUs it sees; hide them with CUDA_VISIBLE_DEVICES='' to run on the CPU"
            )
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["ACCELERATE_USE_CPU"] = "false"
    try:
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed was asked for but cannot be imported ({error}); install sa3dist[deepspeed]"
        ) from error
    # On a CPU it would compile an all-reduce of its own on first use, which only inference takes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _find_file() -> None:
    """Make the launcher's relative path absolute: below the working directory, or as shipped with this package.

    So the files in ``configs/accelerate`` work from any directory.
    """
    named = os.environ.get(FILE_VARIABLE, "none")
    if named == "none":
        raise ConfigError("DeepSpeed was asked for without a file; give accelerate launch --deepspeed_config_file")
    package = Path(sa3dist.__file__).parent
    places = [Path(named), package.parent / named, package / named]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f"deepspeed_config_file: {named} is neither below {Path.cwd()} nor shipped with sa3dist")
    os.environ[FILE_VARIABLE] = str(found.resolve())


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without the values a launcher was to fill in: DeepSpeed's own defaults hold for them."""
    kept = {key: without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in kept.items() if value != "auto"}


def check(config: dict[str, Any]) -> None:
    """Raises ConfigError for what contradicts the run's settings. Says what it overrides."""
    config = without_auto(config)
    stage = config["zero_optimization"].get("stage")
    if stage not in (1, 2, 3):
        raise ConfigError(f"ds_config: zero_optimization.stage is {stage}, expected 1, 2 or 3; without ZeRO use DDP")
    for section, decides in OURS.items():
        if config.get(section):
            raise ConfigError(f"ds_config: remove {section}, {decides}")
    if config.get("gradient_clipping"):
        raise ConfigError("ds_config: remove gradient_clipping, gradients are not clipped here")
    for section in HALF_PRECISION:
        if config.get(section, {}).get("enabled"):
            log.warning(
                "ds_config: %s.enabled is turned off; adapters, gradients and moments are float32 in every mode, "
                "mixed_precision sets the autocast of the step",
                section,
            )


def build(
    config: dict[str, Any], micro_batch: int, accumulation: int, world_size: int, compression: str
) -> dict[str, Any]:
    """What ``deepspeed.initialize`` takes.

    config        the launcher's, passed by ``check``
    micro_batch   clips per process and micro batch; accumulation: micro batches per process and step
    compression   gradient_compression: "none" or "bf16"
    Raises ConfigError when the file fixes other batch sizes.
    """
    config = without_auto(config)
    sizes = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
    }
    for key, size in sizes.items():
        # Accelerate writes an accumulation of 1 into a file that has none.
        if config.get(key, size) not in (size, 1):
            raise ConfigError(f"ds_config: {key} is {config[key]}, this run's is {size}; remove it or say auto")
    config.update(sizes)
    config.update({section: {"enabled": False} for section in HALF_PRECISION if section in config})
    config["communication_data_type"] = "bf16" if compression == "bf16" else "fp32"
    # Optimiser state on the CPU works with torch's AdamW; DeepSpeed's own would need a compiler.
    config["zero_force_ds_cpu_optimizer"] = False
    return config
