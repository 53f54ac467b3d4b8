"""The header entries of an adapter file that describe it, by ModelSpec and our own."""

from pathlib import Path
from typing import Any

from sa3dist.adapters.file import EXTRA_KEYS
from sa3dist.data.remote.local_paths import expand_home
from sa3dist.model.released import RELEASED

# ModelSpec architectures. A base and its post-trained sibling are the same.
ARCHITECTURES = {
    "medium-base": "stable-audio-3-medium",
    "small-music-base": "stable-audio-3-small",
    "small-sfx-base": "stable-audio-3-small",
}
HEADER_KEYS = ("step", "epoch", "base_model", "base_sha256", "dataset_sha256", "sa3dist_version")


def base_name(model: str) -> str:
    """A base's name in files that are shared: of a directory only the last part."""
    return model if model in RELEASED else Path(expand_home(model)).resolve().name


def extras(description: dict[str, Any]) -> dict[str, Any]:
    """The fields of EXTRA_KEYS for ``lora_config``, from the run's description in config.json."""
    public = _public(description)
    return {key: public[key] for key in EXTRA_KEYS if key in public}


def _public(description: dict[str, Any]) -> dict[str, Any]:
    base = {"base_model": base_name(description["base_model"])} if "base_model" in description else {}
    return {**description, **base}


def header(description: dict[str, Any]) -> dict[str, str]:
    """Header entries that describe an adapter file, including ModelSpec 1.0.1; all values are strings.

    Without ModelSpec's date, so that equal adapters give equal files. Its hash is added when the file is written.
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
