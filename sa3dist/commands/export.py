"""`sa3dist export PATH`: write a run's files from its checkpoint, or an adapter in another program's format."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sa3dist import __version__, export
from sa3dist.adapters.comfyui_format import left_out, to_comfy, to_comfy_diff
from sa3dist.adapters.file import (
    BASE_KEY,
    EXTRA_KEYS,
    AdapterFile,
    config_from_value,
    config_value,
    publishable,
    read_adapter_file,
    write_adapter_file,
)
from sa3dist.adapters.header import base_name, header
from sa3dist.adapters.layouts import peft_folders
from sa3dist.adapters.lazy_file import AdapterOnDisk
from sa3dist.adapters.peft_format import to_peft
from sa3dist.commands import verify
from sa3dist.commands.base_option import base_of_adapter
from sa3dist.commands.merge import into_base, refuse_own
from sa3dist.config import split_argument
from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import CheckpointError, ConfigError, InUse
from sa3dist.formats import atomic_directory, write_json
from sa3dist.model.hub import is_cached
from sa3dist.model.loading import WEIGHTS_NAME, BaseOnDisk
from sa3dist.model.released import RELEASED
from sa3dist.model.rewrite_safetensors import write_safetensors
from sa3dist.runtime import run_lock
from sa3dist.runtime.exit_status import command
from sa3dist.training import checkpoint

# Path written, target program for ``verify``, and layers that were deliberately left out.
Written = tuple[Path, str, list[str]]
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
ADAPTER_SUFFIX = ".safetensors"
# All but the first are files from torch.save.
ADAPTER_SUFFIXES = (ADAPTER_SUFFIX, ".ckpt", ".pt", ".pth", ".bin")


def is_path(words: Sequence[str]) -> bool:
    """Whether the arguments of ``sa3dist export`` name a PATH to export, rather than a run's settings."""
    names = [word for word in words if word.startswith("-") or split_argument(word) is None]
    return any(
        name.partition("=")[0] in (*ARGUMENTS, "-h", "--help")
        if name.startswith("-")
        else not (name.lower().endswith(CONFIG_SUFFIXES) or os.path.isfile(os.path.expanduser(name)))
        or name.endswith(ADAPTER_SUFFIXES)
        for name in names
    )


def from_checkpoint(source: Path, output: Path | None) -> dict:
    """Publish what the run would have published at that checkpoint. Returns the result.

    source   a checkpoint directory, or an output_dir (its newest intact checkpoint)
    output   default: the output_dir; for a checkpoint directory ``exported/<its name>`` next to ``checkpoints``
    Raises CheckpointError if there is no intact checkpoint, if not every key of the file lands, or like
    ``publish_saved``; InUse if a run writes to the directory.
    """
    saved, default = _open_checkpoint(source)
    try:
        with run_lock.held(output or default):
            result = export.publish_saved(saved, output or default)
    except InUse as problem:
        raise InUse(f"{problem} with --output") from None
    verify.check_keys((output or default) / export.LORA_NAME)
    return result


def _open_checkpoint(source: Path) -> tuple[checkpoint.Checkpoint, Path]:
    if (source / checkpoint.STATE_NAME).is_file():
        source = source.resolve()
        return checkpoint.load(source), source.parent.parent / "exported" / source.name
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder; give a run's output_dir, a checkpoint or an adapter")
    saved = checkpoint.find(source, "auto")
    if saved is None:
        raise CheckpointError(f"{source}: no intact checkpoint here; give a run's output_dir or a checkpoint directory")
    return saved, source


def is_adapter(source: Path) -> bool:
    """Whether ``source`` is an adapter file or PEFT folder, not a run or a checkpoint directory."""
    return source.suffix in ADAPTER_SUFFIXES or bool(peft_folders(source))


def read_source(source: Path, lora_config: str | None = None) -> tuple[AdapterFile, Path]:
    """The adapter to convert, and the path from which the converted file's name is derived."""
    if is_adapter(source):
        return read_adapter_file(source, lora_config), source
    saved, directory = _open_checkpoint(source)
    config = config_from_value(saved.state["identity"]["lora_config"])
    description = {**saved.state.get("description", {}), "step": saved.step}
    target = directory / export.LORA_NAME
    tensors, base = publishable(saved.adapters), description.get("base_model")
    return AdapterFile(target, config, tensors, header(description), of_run=base), target


def convert(options: argparse.Namespace) -> None:
    """Write the files in ``options.format``. Raises ConfigError if that format cannot represent the adapter."""
    native = options.format in ("sa3", "native")
    if options.baked_norms and not native:
        raise ConfigError(f"--baked-norms: only for --format native, not for {options.format}")
    if native and not options.baked_norms and not is_adapter(options.source):
        print(json.dumps(from_checkpoint(options.source, options.output)))
        return
    file, named_after = read_source(options.source, options.lora_config)
    if options.output is not None:
        refuse_own(options.output, [file])
    name = options.base or file.base

    @functools.cache
    def over_base() -> AdapterOnDisk:
        return AdapterOnDisk(file, BaseOnDisk.open(base_of_adapter(file.path, options.base, [file.base], "--base")))

    output, target, without = FORMATS[options.format](file, over_base, options, named_after)
    print(f"wrote {output}" + (f", without {', '.join(without)}" if without else ""))
    if name is None or not (options.base or over_base.cache_info().currsize or at_hand(name)):
        where = "a base it does not name" if name is None else f"{name}, which is not on this machine"
        print(f"not verified over {where}: sa3dist verify {output} --for {target} --base MODEL", file=sys.stderr)
        return
    verify.check(output, target, over_base().base, over_base(), without)


def at_hand(name: str) -> bool:
    """Whether the base can be opened without a download."""
    return is_cached(RELEASED[name], WEIGHTS_NAME) if name in RELEASED else os.path.isdir(home_path(name))


def _comfy(file: AdapterFile, base: Callable[[], AdapterOnDisk], options, named_after: Path) -> Written:
    missing = left_out(file)
    if missing and not options.without_conditioner:
        raise ConfigError(
            f"{file.path}: ComfyUI cannot patch {', '.join(missing)}, which this adapter changes; train with "
            f"exclude=[conditioners] for an exact file, or leave it out with --without-conditioner"
        )
    tensors = to_comfy_diff(base()) if options.format == "comfy-diff" else to_comfy(file, base)
    output = options.output or named_after.with_suffix(f".{options.format}{ADAPTER_SUFFIX}")
    write_safetensors(output, tensors, _header(file, left_out=missing))
    return output, "comfy", missing


def _native(file: AdapterFile, base: Callable[[], AdapterOnDisk], options, named_after: Path) -> Written:
    if options.baked_norms and not file.config.kind.rows:
        raise ConfigError(f"{file.path}: --baked-norms are of rows, which {file.config.adapter_type} does not divide")
    baked = {name: base().row_norms(name) for name in file.layers()} if options.baked_norms else {}
    # As named by Stable Audio 3's own tool.
    ending = ".normbaked" if baked else ".native"
    output = options.output or named_after.with_suffix(f"{ending}{ADAPTER_SUFFIX}")
    numbers = {key: file.metadata[key] for key in EXTRA_KEYS if key in file.metadata}
    extras = {key: int(value) if value.isdecimal() else value for key, value in numbers.items()}
    if baked:
        extras |= {"baked_norms": len(baked), "norm_base": base_name(options.base or file.base)}
    metadata = {} if file.foreign else file.metadata
    write_adapter_file(output, file.config, file.tensors, {**metadata, **_header(file)}, extras, baked)
    return output, "native", []


def _merged(file: AdapterFile, base: Callable[[], AdapterOnDisk], options, named_after: Path) -> Written:
    output = options.output or named_after.with_suffix(".merged")
    into_base(output, base().base, [(base(), 1.0)])
    return output, "merged", []


def _peft(file: AdapterFile, base: Callable[[], AdapterOnDisk], options, named_after: Path) -> Written:
    output = options.output or named_after.with_suffix(f".{options.format}")
    if output.exists():
        raise ConfigError(f"--output: {output} exists already; choose a new directory")
    parts = to_peft(file, base, port=options.format == "diffusers")
    with atomic_directory(output) as temporary:
        for part, (config, tensors) in parts.items():
            write_json(temporary / part / "adapter_config.json", config)
            write_safetensors(temporary / part / "adapter_model.safetensors", tensors, _header(file))
    return output, options.format, []


def _header(file: AdapterFile, **more) -> dict[str, str]:
    header = {key: file.metadata[key] for key in ("step", "base_model", BASE_KEY) if key in file.metadata}
    added = {"format": "pt", "converted_from": config_value(file.config), "sa3dist_version": __version__, **more}
    return header | {key: value if isinstance(value, str) else json.dumps(value) for key, value in added.items()}


FORMATS = {
    "native": _native,
    "sa3": _native,
    "peft": _peft,
    "comfy": _comfy,
    "comfy-diff": _comfy,
    "diffusers": _peft,
    "merged": _merged,
}
ARGUMENTS = {
    "source": {
        "type": home_path,
        "metavar": "PATH",
        "help": "a run's output_dir, a checkpoint, or an adapter",
    },
    "--output": {"type": home_path, "help": "directory of a run's files, else the file or folder to write"},
    "--format": {"choices": FORMATS, "default": "native", "help": "sa3 is another name of native"},
    "--base": {"metavar": "MODEL", "help": "base to convert over; default the one the adapter names"},
    "--without-conditioner": {"action": "store_true", "help": "comfy: leave out layers that ComfyUI cannot patch"},
    "--baked-norms": {"action": "store_true", "help": "native: add the norms of rows, as float32"},
    "--lora-config": {"metavar": "JSON", "help": "rank, alpha and adapter_type of a file that does not say"},
}
# 0 when written; 2, with one line and nothing written, when this cannot be exported like this.
main = command(
    "sa3dist export",
    ARGUMENTS,
    convert,
    description="Write the files of a run from a checkpoint, or an adapter in another program's layout.",
    epilog="In place of PATH the run may be named by its settings, CONFIG.yaml and key=value as of sa3dist train, and "
    "resume=CHECKPOINT: its newest checkpoint is then exported into its output_dir. The options are for PATH.",
)
