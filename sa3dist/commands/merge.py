"""`sa3dist merge`: merge several adapters into one file, or adapters into the weights of a base."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sa3dist import __version__
from sa3dist.adapters.attach import MAX_STRENGTH
from sa3dist.adapters.combine import approximate, combine, merged_weight
from sa3dist.adapters.file import BASE_KEY, AdapterFile, config_value, read_adapter_file, write_adapter_file
from sa3dist.adapters.lazy_file import AdapterOnDisk
from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import ConfigError
from sa3dist.formats import atomic_directory, atomic_path
from sa3dist.model.base import weight_key
from sa3dist.model.loading import CONFIG_NAME, WEIGHTS_NAME, BaseOnDisk
from sa3dist.model.rewrite_safetensors import rewrite_checkpoint
from sa3dist.progress import progress
from sa3dist.runtime.exit_status import command

EPILOG = """\
  sa3dist merge piano.safetensors=0.7 drums.safetensors=0.3 --output both.safetensors
      one adapter, exactly: lora files by adding up their ranks, lora-xs files by adding up their cores
  sa3dist merge drums.safetensors --base medium-base --output merged/
      a whole base with the adapter inside, for any types: W0 + sum of weight * (W' - W0)
  sa3dist merge a.safetensors b.safetensors --base medium-base --svd 64 --output both.safetensors
      one lora of rank 64 nearest to that sum, for any types; the error of every layer is printed"""


ARGUMENTS = {
    "adapters": {"nargs": "+", "metavar": "FILE[=WEIGHT]", "help": "adapter files; a weight is 1 when left out"},
    "--output": {"type": home_path, "required": True, "help": "the new adapter file, or the new base's directory"},
    "--base": {"metavar": "MODEL", "help": "released name or directory of the base to merge into"},
    "--svd": {"type": int, "metavar": "RANK", "help": "with --base: write a lora of this rank, not a base"},
}


def merge(options: argparse.Namespace) -> None:
    """Write the merged adapter or base."""
    weighted = map(split_weight, options.adapters)
    files = [(read_adapter_file(path), weight) for path, weight in weighted]
    if options.svd is not None and (options.base is None or options.svd < 1):
        raise ConfigError("--svd: needs a rank of at least 1, and --base MODEL for the weights that are changed")
    refuse_own(options.output, [file for file, _ in files])
    if options.base is None:
        write_adapter_file(options.output, *combine(files), describe(files))
        print(f"wrote {options.output}")
        return
    base = BaseOnDisk.open(options.base)
    adapters = [(AdapterOnDisk(file, base), weight) for file, weight in files]
    for adapter, _ in adapters:
        if adapter.of_another_base:
            print(f"note: {adapter.file.path} was trained on another base than {options.base}", file=sys.stderr)
    if options.svd is not None:
        write_approximation(options.output, adapters, options.svd)
    else:
        into_base(options.output, base, adapters)
        print(f"wrote {options.output}")


def refuse_own(output: Path, files: Sequence[AdapterFile]) -> None:
    """Raises ConfigError if ``output`` is one of the input files."""
    for file in files:
        if output.exists() and file.path.exists() and output.samefile(file.path):
            raise ConfigError(f"--output: {output} is one of the inputs; choose a new file")


def split_weight(argument: str) -> tuple[str, float]:
    """Path and weight of ``FILE=WEIGHT``; default 1. Raises ConfigError for a weight that is not a finite number."""
    path, equals, text = argument.rpartition("=")
    if not equals or os.path.exists(argument):
        return argument, 1.0
    try:
        weight = float(text)
    except ValueError as error:
        raise ConfigError(f"{argument}: the weight {text!r} is not a number; expected FILE or FILE=WEIGHT") from error
    if not abs(weight) <= MAX_STRENGTH:
        raise ConfigError(f"{argument}: the weight {text!r} is not a number up to {MAX_STRENGTH:.0f}")
    return path, weight


def describe(files: Sequence[tuple[AdapterFile, float]]) -> dict[str, str]:
    """Header entries of a merged file: its parts, and the base if all parts have the same."""
    parts = [
        {"file": file.path.name, "weight": weight, "lora_config": config_value(file.config)} for file, weight in files
    ]
    header = {"merged_from": json.dumps(parts), "sa3dist_version": __version__}
    for key in (BASE_KEY, "base_model"):
        values = {file.metadata.get(key) for file, _ in files}
        if len(values) == 1 and None not in values:
            header[key] = values.pop()
    return header


def write_approximation(output: Path, adapters: Sequence[tuple[AdapterOnDisk, float]], rank: int) -> None:
    errors: list[float] = []

    def report(name: str, error: float) -> None:
        errors.append(error)
        print(f"{name}: relative error {error:.3g}")

    config, tensors = approximate(adapters, rank, report)
    header = describe([(adapter.file, weight) for adapter, weight in adapters])
    write_adapter_file(output, config, tensors, {**header, "svd_largest_relative_error": f"{max(errors):.6g}"})
    print(
        f"wrote {output}: a lora of rank {rank}, relative error of a layer's change up to {max(errors):.3g}; a higher "
        f"rank has a smaller one"
    )


def into_base(output: Path, base: BaseOnDisk, adapters: Sequence[tuple[AdapterOnDisk, float]]) -> None:
    """Write a base directory with merged weights: config, weights, and the text encoder if the base contains it.

    All other weights are copied byte for byte.
    """
    if output.exists():
        raise ConfigError(f"--output: {output} exists already; choose a new directory")
    names = list(dict.fromkeys(name for adapter, _ in adapters for name in adapter.layers))
    header = describe([(adapter.file, weight) for adapter, weight in adapters])
    with progress("merge", len(names), shown=True) as update, atomic_directory(output) as temporary:
        done = iter(range(1, len(names) + 1))

        def merged(name: str):
            update(next(done))
            return merged_weight(adapters, name)

        changed = {weight_key(name): (lambda name=name: merged(name)) for name in names}
        rewrite_checkpoint(base.files.weights, temporary / WEIGHTS_NAME, changed, header)
        copy_file(base.files.config, temporary / CONFIG_NAME)
        folder = base.config.prompt.subfolder
        if base.files.directory and folder and (base.files.directory / folder).is_dir():
            shutil.copytree(base.files.directory / folder, temporary / folder, copy_function=copy_file)
    print(f"{len(names)} of {len(base.weights.shapes)} tensors changed")


def copy_file(source: str | Path, target: str | Path) -> None:
    with atomic_path(Path(target)) as temporary:
        shutil.copyfile(source, temporary)


# Exit code 0 when written; 2, with one line and nothing written, if the files cannot be merged.
main = command(
    "sa3dist merge",
    ARGUMENTS,
    merge,
    description="Merge adapters into one file, or into a base.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
)
