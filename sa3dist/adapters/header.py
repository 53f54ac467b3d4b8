"""The header of an adapter file: what it is, in ModelSpec's names and ours."""

from pathlib import Path
from typing import Any

# ModelSpec's names of what takes one file: a base and its post-trained sibling are one.
ARCHITECTURES = {
    "medium-base": "stable-audio-3-medium",
    "small-music-base": "stable-audio-3-small",
    "small-sfx-base": "stable-audio-3-small",
}
HEADER_KEYS = ("step", "epoch", "base_model", "base_sha256", "dataset_sha256", "sa3dist_version")


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
