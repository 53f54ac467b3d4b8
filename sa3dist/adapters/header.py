"""The header of an adapter file: its description, in ModelSpec's names and ours."""

from pathlib import Path
from typing import Any

from sa3dist.adapters.file import EXTRA_KEYS
from sa3dist.data.remote.local_paths import expand_home
from sa3dist.model.released import RELEASED

# ModelSpec's names for the models that take a file: a base and its post-trained sibling share one.
ARCHITECTURES = {
    "medium-base": "stable-audio-3-medium",
    "small-music-base": "stable-audio-3-small",
    "small-sfx-base": "stable-audio-3-small",
}
HEADER_KEYS = ("step", "epoch", "base_model", "base_sha256", "dataset_sha256", "sa3dist_version")


def base_name(model: str) -> str:
    """The name of a base in files that are given away: for a directory its last part, never its path."""
    return model if model in RELEASED else Path(expand_home(model)).resolve().name


def extras(description: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``lora_config`` beyond the adapter's own, from the run's config.json."""
    said = _public(description)
    return {key: said[key] for key in EXTRA_KEYS if key in said}


def _public(description: dict[str, Any]) -> dict[str, Any]:
    base = {"base_model": base_name(description["base_model"])} if "base_model" in description else {}
    return {**description, **base}


def header(description: dict[str, Any]) -> dict[str, str]:
    """Descriptive entries of an adapter file's header, ModelSpec 1.0.1 among them, all as text.

    Without ModelSpec's date, so that equal adapters are equal files. Its hash is added when the file is written.
    Source: github.com/Stability-AI/ModelSpec.
    """
    description = _public(description)
    base = description.get("base_model", "")
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{ARCHITECTURES.get(base, 'stable-audio-3')}/lora",
        "implementation": "https://github.com/Stability-AI/stable-audio-3",
        "title": description.get("settings", {}).get("name", "sa3dist-lora"),
        "description": f"Adapter of Stable Audio 3 ({base}) after {description.get('step')} steps",
        "license": "Stability AI Community License, https://stability.ai/license",
    }
    own = {key: description[key] for key in HEADER_KEYS if key in description}
    return {key: str(value) for key, value in {**own, **{f"modelspec.{key}": spec[key] for key in spec}}.items()}
