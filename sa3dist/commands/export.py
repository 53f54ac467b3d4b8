"""`sa3dist export PATH`: the files of a run from its checkpoint alone, or an adapter in another program's layout."""

import argparse
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sa3dist import __version__, export
from sa3dist.adapters.comfyui_format import left_out, to_comfy, to_comfy_diff
from sa3dist.adapters.file import (
    BASE_KEY,
    AdapterFile,
    config_from_value,
    config_value,
    publishable,
    read_adapter_file,
)
from sa3dist.adapters.lazy_file import AdapterOnDisk
from sa3dist.adapters.peft_format import to_peft
from sa3dist.config import split_argument
from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import CheckpointError, ConfigError, InUse
from sa3dist.formats import atomic_directory, write_json
from sa3dist.model.loading import BaseOnDisk
from sa3dist.model.rewrite_safetensors import write_safetensors
from sa3dist.runtime import run_lock
from sa3dist.runtime.exit_status import run_command
from sa3dist.training import checkpoint

ADAPTER_SUFFIX = ".safetensors"


def is_path(words: Sequence[str]) -> bool:
    """Whether the words of ``sa3dist export`` name something to export from, not a config of a run."""
    names = [word for word in words if word.startswith("-") or split_argument(word) is None]
    return any(
        os.path.isdir(os.path.expanduser(name)) or name.endswith(ADAPTER_SUFFIX) or name.startswith("--format")
        for name in names
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0 when written; 2, with one line and nothing written, when this cannot be exported like this."""
    about = "Write the files of a run from a checkpoint, or an adapter in another program's layout."
    return run_command("sa3dist export", ARGUMENTS, convert, argv, description=about)


def from_checkpoint(source: Path, output: Path | None) -> dict:
    """Publish what the run itself would have published at that checkpoint. Returns the result.

    source   a checkpoint directory, or an output_dir: its newest intact checkpoint
    output   default the output_dir itself; for a checkpoint directory, ``exported/<its name>`` beside ``checkpoints``
    Raises CheckpointError when there is no intact checkpoint or as ``publish_saved``, InUse when a run writes there.
    """
    saved, default = _open_checkpoint(source)
    try:
        with run_lock.held(output or default):
            return export.publish_saved(saved, output or default)
    except InUse as problem:
        raise InUse(f"{problem} with --output") from None


def _open_checkpoint(source: Path) -> tuple[checkpoint.Checkpoint, Path]:
    if (source / checkpoint.STATE_NAME).is_file():
        source = source.resolve()
        return checkpoint.load(source), source.parent.parent / "exported" / source.name
    saved = checkpoint.find(source, "auto")
    if saved is None:
        raise CheckpointError(f"{source}: no intact checkpoint here; give a run's output_dir or a checkpoint directory")
    return saved, source


def read_source(source: Path) -> tuple[AdapterFile, Path]:
    """The adapter to convert, as its file holds it, and the path its converted file is named after."""
    if source.suffix == ADAPTER_SUFFIX:
        return read_adapter_file(source), source
    saved, directory = _open_checkpoint(source)
    config = config_from_value(saved.state["identity"]["lora_config"])
    description = {**saved.state.get("description", {}), "step": saved.step}
    metadata = {key: str(description[key]) for key in export.HEADER_KEYS if key in description}
    target = directory / export.LORA_NAME
    return AdapterFile(target, config, publishable(saved.adapters), metadata), target


def convert(options: argparse.Namespace) -> None:
    """Write the files in ``options.format``. Raises ConfigError where that layout cannot say the same."""
    if options.format == "sa3":
        print(json.dumps(from_checkpoint(options.source, options.output)))
        return
    file, named_after = read_source(options.source)

    @functools.cache
    def over_base() -> AdapterOnDisk:
        name = options.base or file.metadata.get("base_model")
        if name is None:
            raise ConfigError(f"{file.path}: names no base model; give the one it was trained on with --base MODEL")
        return AdapterOnDisk(file, BaseOnDisk.open(name))

    FORMATS[options.format](file, over_base, options, named_after)


def _comfy(file: AdapterFile, base: Callable[[], AdapterOnDisk], options, named_after: Path) -> None:
    missing = left_out(file)
    if missing and not options.without_conditioner:
        raise ConfigError(
            f"{file.path}: ComfyUI cannot patch {', '.join(missing)}, which this adapter changes; train with "
            f"exclude=[conditioners] for an exact file, or leave it out with --without-conditioner"
        )
    tensors = to_comfy_diff(base()) if options.format == "comfy-diff" else to_comfy(file, base)
    output = options.output or named_after.with_suffix(f".{options.format}{ADAPTER_SUFFIX}")
    write_safetensors(output, tensors, _header(file, left_out=missing))
    print(f"wrote {output}" + (f", without {', '.join(missing)}" if missing else ""))


def _diffusers(file: AdapterFile, base: Callable[[], AdapterOnDisk], options, named_after: Path) -> None:
    output = options.output or named_after.with_suffix(".diffusers")
    if output.exists():
        raise ConfigError(f"--output: {output} exists already; choose a new directory")
    parts = to_peft(file, base)
    with atomic_directory(output) as temporary:
        for part, (config, tensors) in parts.items():
            write_json(temporary / part / "adapter_config.json", config)
            write_safetensors(temporary / part / "adapter_model.safetensors", tensors, _header(file))
    print(f"wrote {output}: {', '.join(parts)}")


def _header(file: AdapterFile, **more) -> dict[str, str]:
    kept = {key: file.metadata[key] for key in ("step", "base_model", BASE_KEY) if key in file.metadata}
    made = {"format": "pt", "converted_from": config_value(file.config), "sa3dist_version": __version__, **more}
    return {**kept, **{key: value if isinstance(value, str) else json.dumps(value) for key, value in made.items()}}


FORMATS = {"comfy": _comfy, "comfy-diff": _comfy, "diffusers": _diffusers}
ARGUMENTS = {
    "source": {"type": home_path, "metavar": "PATH", "help": "a run's output_dir, a checkpoint directory, or a file"},
    "--output": {"type": home_path, "help": "directory of the files, or with --format the file or folder"},
    "--format": {"choices": ["sa3", *FORMATS], "default": "sa3", "help": "all but sa3 are experimental"},
    "--base": {"metavar": "MODEL", "help": "base to convert over; default the one the adapter names"},
    "--without-conditioner": {"action": "store_true", "help": "comfy: leave out layers that ComfyUI cannot patch"},
}
