"""What a launcher says about DeepSpeed, and the environment DeepSpeed needs before the process group is made."""

import json
import os
from pathlib import Path

import torch

import sa3dist
from sa3dist.errors import ConfigError

FILE_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
USE_VARIABLE = "ACCELERATE_USE_DEEPSPEED"


def asked_for() -> bool:
    """Whether the launcher started this process for DeepSpeed."""
    return os.environ.get(USE_VARIABLE, "").lower() in {"1", "true", "yes"}


def prepare_environment(on_cpu: bool) -> None:
    """Set what Accelerate and DeepSpeed read when this process joins the others. Raises ConfigError."""
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
    # On a CPU DeepSpeed would compile an all-reduce of its own on first use, although only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _find_file() -> None:
    """Make the launcher's relative path absolute: below the working directory, or as shipped with this package.

    So the files in ``configs/accelerate`` work from any directory. Raises ConfigError for a file that DeepSpeed or
    Accelerate cannot read.
    """
    named = os.environ.get(FILE_VARIABLE, "none")
    if named == "none":
        raise ConfigError("DeepSpeed was asked for without a file; give accelerate launch --deepspeed_config_file")
    package = Path(sa3dist.__file__).parent
    places = [Path(named), package.parent / named, package / named]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f"deepspeed_config_file: {named} is neither below {Path.cwd()} nor shipped with sa3dist")
    try:
        config = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{found}: cannot be read as the JSON file of DeepSpeed ({error})") from error
    # Refused here, because Accelerate would end with a traceback.
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise ConfigError(f"{found}: no section zero_optimization, expected its stage to be 1, 2 or 3; else use DDP")
    os.environ[FILE_VARIABLE] = str(found.resolve())
