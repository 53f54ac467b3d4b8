"""`sa3dist verify FILE --for TARGET`: check that a program loads every layer of a file, with the adapter's effect."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sa3dist.adapters import landing, landing_peft
from sa3dist.adapters.attach import SLOT
from sa3dist.adapters.file import base_of, read_adapter_file, weights_in
from sa3dist.adapters.landing import Landing
from sa3dist.adapters.layouts import PEFT_WEIGHTS, peft_folders
from sa3dist.adapters.lazy_file import AdapterOnDisk, effective
from sa3dist.commands.base_option import base_of_adapter
from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import CheckpointError, ConfigError
from sa3dist.export import LORA_NAME
from sa3dist.model.loading import CONFIG_NAME, WEIGHTS_NAME, BaseOnDisk, known_config, meta_roots
from sa3dist.model.released import RELEASED
from sa3dist.progress import progress
from sa3dist.runtime.exit_status import command

TARGETS = {
    "native": landing.native,
    "peft": landing_peft.peft,
    "comfy": landing.comfy,
    "diffusers": landing_peft.diffusers,
    "merged": landing.merged,
}
MOST_LINES = 10


ARGUMENTS = {
    "file": {
        "type": home_path,
        "metavar": "FILE",
        "help": "an adapter file, a run or a PEFT folder; merged: the directory",
    },
    "--for": {"dest": "target", "choices": TARGETS, "required": True, "help": "the program to load it with"},
    "--base": {"metavar": "MODEL", "help": "base to load it into; default: the one that the file, or ADAPTER, names"},
    "--against": {"type": home_path, "metavar": "ADAPTER", "help": "the adapter it was made from"},
}


def verify(options: argparse.Namespace) -> None:
    """``check`` the given file. Raises ConfigError if no base is known or it is not here."""
    path = options.file.parent if options.file.name in PEFT_WEIGHTS else options.file
    if (path / LORA_NAME).is_file():
        path = path / LORA_NAME
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such file or folder; give the adapter file to verify")
    against = read_adapter_file(options.against) if options.against else None
    named = [named_base(path), against.base if against else None]
    base = BaseOnDisk.open(base_of_adapter(path, options.base, named, "--base"))
    check(path, options.target, base, AdapterOnDisk(against, base) if against else None)


def named_base(path: Path) -> str | None:
    """The base named in a file, a PEFT folder or a merged base; None if none is."""
    if path.is_dir():
        folders = peft_folders(path)
        path = weights_in(folders[0]) if folders else path / WEIGHTS_NAME
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        return base_of(path, file.metadata() or {})
    return None


def own_reading(path: Path, base: BaseOnDisk) -> Callable[[str], torch.Tensor] | None:
    """A function that gives a layer's effective weight as we read it from the file.

    None if the format does not contain enough, as with merged bases and ComfyUI's own norms.
    """
    try:
        file = read_adapter_file(path)
    except CheckpointError:
        return None
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in file.tensors.items():
        name, _, tensor = key.rpartition(f".{SLOT}.")
        layers.setdefault(name, {})[tensor] = value
    return lambda name: effective(file.config, layers[name], base.fp32_weight(name))


def check(path: Path, target: str, base: BaseOnDisk, source: AdapterOnDisk | None, without: Sequence[str] = ()) -> None:
    """Print which layers land, last line ``N/N layers land``. Raises CheckpointError if one does not.

    source    the adapter to compare effective weights with; None: the file as we read it
    without   layers of the source that were deliberately left out
    """
    landed: Landing = TARGETS[target](path, base)
    expected = own_reading(path, base) if source is None else source.effective_weight
    if source is not None:
        for name in landed.weights.keys() ^ source.layers.keys():
            if name in landed.weights:
                del landed.weights[name]
                landed.missed[name] = "is no layer of the adapter"
            elif name not in without:
                landed.missed.setdefault(name, "is not in the file")
    with progress("verify", len(landed.weights), shown=bool(landed.weights)) as update:
        landed.compare(base, expected, update)
    for name, why in list(landed.missed.items())[:MOST_LINES]:
        print(f"{name}: {why}")
    if len(landed.missed) > MOST_LINES:
        print(f"and {len(landed.missed) - MOST_LINES} more")
    if expected is None:
        print("effective weights: finite and changed, compared with nothing; give the adapter with --against")
    elif landed.weights:
        share, name = landed.largest
        print(
            f"effective weights: differ from the adapter's by at most {share:.1e} of a layer's change ({name})"
            if share
            else "effective weights: equal to the adapter's"
        )
    print(_count(landed), flush=True)
    _require_all(path, landed)


def check_keys(path: Path) -> None:
    """``check`` for the native format, by names and shapes only, which needs just the base's config.

    Does nothing if the file names no base, or the base does not exist.
    """
    file = read_adapter_file(path)
    name = file.base or ""
    if name in RELEASED or (home_path(name) / CONFIG_NAME).is_file():
        landed = landing.by_name(file, meta_roots(known_config(name)))
        print(_count(landed), file=sys.stderr)
        _require_all(path, landed)


def _count(landed: Landing) -> str:
    return f"{len(landed.weights)}/{len(landed.weights) + len(landed.missed)} layers land"


def _require_all(path: Path, landed: Landing) -> None:
    if landed.missed or not landed.weights:
        name, why = next(iter(landed.missed.items()), ("the file", "holds no layer"))
        advice = "" if landed.weights else "; the file is of another format, or of another base"
        raise CheckpointError(f"{path}: not every layer lands, {len(landed.missed)} do not ({name}: {why}){advice}")


# Exit code 0 if every layer lands; else 2, with the layers that do not.
main = command(
    "sa3dist verify",
    ARGUMENTS,
    verify,
    description="Check whether a program loads every layer of an adapter file, and whether the layers then act as the "
    "adapter intends.",
)
