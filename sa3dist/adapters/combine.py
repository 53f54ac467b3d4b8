"""Combines several adapter files into one: exactly if the sum of their updates has the same form, else by SVD.

Legend: O fan_out, I fan_in, R rank.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from sa3dist.adapters.attach import SLOT, AdapterConfig
from sa3dist.adapters.file import BASE_KEY, AdapterFile
from sa3dist.adapters.lazy_file import AdapterOnDisk
from sa3dist.errors import CheckpointError, ConfigError

Weighted = Sequence[tuple[AdapterFile, float]]


def combine(files: Weighted) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """One adapter whose update is the weighted sum of the files' updates, in float32, exact up to its products.

    lora      concatenates the factors, so that the ranks add up; a common scale stays in alpha
    lora-xs   adds the cores, which share their singular bases; smaller ones are padded with zeros
    Raises CheckpointError if the files belong to different bases or layers of different shapes, and ConfigError for
    other types: with a magnitude the effective weight is not a sum.
    """
    bases = {file.metadata[BASE_KEY]: file.path for file, _ in files if BASE_KEY in file.metadata}
    if len(bases) > 1:
        one, other = list(bases.values())[:2]
        raise CheckpointError(f"merge: {one} and {other} were trained on different bases ({BASE_KEY} in their headers)")
    kinds = {file.config.kind.name for file, _ in files}
    if kinds not in ({"lora"}, {"lora-xs"}):
        raise ConfigError(
            f"merge: {', '.join(sorted(kinds))} cannot be added up exactly in one adapter (only lora, or lora-xs, with "
            f"its own kind); merge into the base with --base MODEL, or approximate with --base MODEL --svd RANK"
        )
    return _add_cores(files) if kinds == {"lora-xs"} else _concatenate(files)


def _concatenate(files: Weighted) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    rank = sum(file.config.rank for file, _ in files)
    scales = [weight * file.config.alpha / file.config.rank for file, weight in files]
    # A common positive scale stays in alpha, so that the factors are the files' values.
    common = scales[0] if scales[0] > 0 and len(set(scales)) == 1 else 1.0
    layers_by_file = [file.layers() for file, _ in files]
    tensors = {}
    for name in dict.fromkeys(name for layers in layers_by_file for name in layers):
        fans = {(own[name]["lora_B"].shape[0], own[name]["lora_A"].shape[1]) for own in layers_by_file if name in own}
        if len(fans) > 1:
            raise CheckpointError(f"merge: {name} has different shapes in the files: {sorted(fans)}; one base for all")
        fan_out, fan_in = fans.pop()
        if rank > min(fan_out, fan_in):
            raise ConfigError(
                f"merge: the ranks add up to {rank}, but {name} ({fan_out} x {fan_in}) allows at most "
                f"{min(fan_out, fan_in)}; approximate with --base MODEL --svd RANK"
            )
        ups, downs = [], []
        for (file, _), scale, own in zip(files, scales, layers_by_file, strict=True):
            # Zeros for a file that does not cover this layer.
            size = file.config.rank
            zeros = {"lora_B": torch.zeros(fan_out, size), "lora_A": torch.zeros(size, fan_in)}
            trained = own.get(name, zeros)
            ups.append(trained["lora_B"].float() * (scale / common))
            downs.append(trained["lora_A"].float())
        tensors[f"{name}.{SLOT}.lora_A"] = torch.cat(downs)
        tensors[f"{name}.{SLOT}.lora_B"] = torch.cat(ups, dim=1)
    return AdapterConfig(rank, common * rank, "lora", *_patterns(files, layers_by_file)), tensors


def _add_cores(files: Weighted) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    rank = max(file.config.rank for file, _ in files)
    layers_by_file = [file.layers() for file, _ in files]
    tensors = {}
    for name in dict.fromkeys(name for layers in layers_by_file for name in layers):
        total = torch.zeros(rank, rank)
        for (file, weight), own in zip(files, layers_by_file, strict=True):
            if name in own:
                size = file.config.rank
                total[:size, :size] += weight * file.config.alpha / size * own[name]["M_xs"].float()
        tensors[f"{name}.{SLOT}.M_xs"] = total
    return AdapterConfig(rank, rank, "lora-xs", *_patterns(files, layers_by_file)), tensors


def approximate(
    adapters: Sequence[tuple[AdapterOnDisk, float]], rank: int, report: Callable[[str, float], None]
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """The plain LoRA of ``rank`` nearest to the weighted sum of the adapters' effective changes, for any types.

    report   called per layer with its name and the relative Frobenius error of the float16 result
    Raises ConfigError if a layer is too small for the rank.
    """
    shapes = {name: layer.weight.flatten(1).shape for adapter, _ in adapters for name, layer in adapter.layers.items()}
    tensors = {}
    for name, shape in shapes.items():
        if rank > min(shape):
            raise ConfigError(f"svd: {rank} is too large for {name} {tuple(shape)}; choose at most {min(shape)}")
        # float32 suffices: it loses 1e-7 of the weight, float16 factors lose 5e-4 of the change.
        change = (merged_weight(adapters, name) - adapters[0][0].base.fp32_weight(name)).flatten(1)
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        # Split each singular value evenly, which loses least in float16.
        root = values[:rank].sqrt()
        up, down = (left[:, :rank] * root).half(), (root[:, None] * right[:rank]).half()
        size = torch.linalg.vector_norm(change).item()
        report(name, torch.linalg.vector_norm(change - up.float() @ down.float()).item() / size if size else 0.0)
        tensors[f"{name}.{SLOT}.lora_A"], tensors[f"{name}.{SLOT}.lora_B"] = down, up
    files = [(adapter.file, weight) for adapter, weight in adapters]
    return AdapterConfig(rank, rank, "lora", *_patterns(files, [adapter.layers for adapter, _ in adapters])), tensors


def merged_weight(adapters: Sequence[tuple[AdapterOnDisk, float]], name: str) -> torch.Tensor:
    """W0 + sum over the adapters of weight * (W' - W0) for one layer, float32, in the shape of its weight.

    For one adapter of weight 1 it equals W' to the last bit.
    """
    mine = [(adapter, factor) for adapter, factor in adapters if name in adapter.layers]
    total = (1 - sum(factor for _, factor in mine)) * mine[0][0].base.fp32_weight(name)
    for adapter, factor in mine:
        total += factor * adapter.effective_weight(name)
    return total


def _patterns(files: Weighted, layers_by_file: Sequence[Iterable[str]]) -> tuple[list[str] | None, list[str] | None]:
    """include and exclude lists that select exactly these layers: the files' own if equal, else full names."""
    own = {(file.config.include, file.config.exclude) for file, _ in files}
    if len(own) == 1:
        include, exclude = own.pop()
        return None if include is None else list(include), None if exclude is None else list(exclude)
    return sorted({name for layers in layers_by_file for name in layers}), None
