"""Adapter files that are not safetensors: PyTorch checkpoints are read, all others are described in a message."""

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from sa3dist.adapters.attach import SLOT
from sa3dist.adapters.layouts import split_key
from sa3dist.data.remote.download import HEAD_BYTES, describe_non_file
from sa3dist.errors import CheckpointError

SUFFIX = ".safetensors"
# PyTorch before 1.6, and plain pickles: protocol 2 or newer.
_PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_PACKED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstandard"))


def what_instead(path: Path, error: Exception) -> str:
    """Says what ``path`` is, for a message that begins with its name, and the next move.

    error   from reading it as a safetensors file
    """
    if os.path.isdir(path):
        # A run's folder, with its exported files.
        names = sorted((name for name in os.listdir(path) if name.endswith(SUFFIX)), key=lambda name: (len(name), name))
        return f"is a folder, expected an adapter file{f'; give {path / names[0]}' if names else ''}"
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as problem:
        return f"cannot be read ({problem.strerror or problem}); check the path"
    if not size:
        return "is empty; copy or download it again"
    if instead := describe_non_file(head):
        return f"is {instead}"
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    for magic, name in _PACKED:
        if head.startswith(magic):
            return f"is compressed with {name}; unpack it first"
    return _cut_off(path, head, size) or f"not a readable safetensors file ({error})"


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "is a zip archive or a PyTorch checkpoint that is cut off; copy or download it again"
    inside = next((name for name in names if name.endswith(SUFFIX)), None)
    return f"is a zip archive; unpack it and give {f'the {inside}' if inside else 'an adapter file'} in it"


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a file written by torch.save, whole or cut off behind its directory."""
    try:
        with open(path, "rb") as stream:
            if stream.read(2).startswith(_PICKLE):
                return True
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a PyTorch checkpoint and, as JSON, its ``lora_config`` if it has one.

    Only tensors and plain values are unpickled: any other pickle may run its author's code.
    Raises CheckpointError for such a pickle, a damaged file, or one without an adapter's tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged files make torch raise nearly anything.
        raise CheckpointError(
            f"{path}: is a pickle that torch.load(..., weights_only=True) refuses ({type(error).__name__}): it is "
            f"damaged, or of more than tensors and plain values; save its state_dict and lora_config alone"
        ) from error
    inner = content.get("state_dict") if isinstance(content, Mapping) else None
    values = inner if isinstance(inner, Mapping) else content if isinstance(content, Mapping) else {}
    tensors = {key: value for key, value in values.items() if isinstance(key, str) and torch.is_tensor(value)}
    if not any(f".{SLOT}." in key or split_key(key)[1] for key in tensors):
        content_names = ", ".join(map(str, list(values)[:3])) or type(content).__name__
        raise CheckpointError(
            f"{path}: is a PyTorch checkpoint without adapter tensors ({content_names}), expected an adapter file"
        )
    config = content.get("lora_config")
    return tensors, {"lora_config": json.dumps(config)} if isinstance(config, Mapping) else {}


def guess(tensors: Mapping[str, torch.Tensor]) -> dict:
    """What names and shapes tell of an adapter's config; alpha is the rank unless it was chosen."""
    names = {key.rpartition(".")[2] for key in tensors}
    kind = "bora" if "magnitude_r" in names else "dora-rows" if "magnitude" in names else "lora"
    core = "M_xs" if "M_xs" in names else "lora_A"
    rank = next((value.shape[0] for key, value in tensors.items() if key.endswith(f".{core}")), None)
    return {"rank": rank, "alpha": rank, "adapter_type": f"{kind}-xs" if core == "M_xs" else kind}


def _cut_off(path: Path, head: bytes, size: int) -> str | None:
    """A safetensors file says in its header how long it is."""
    if head[8:9] != b"{":
        return f"is cut off after {size} bytes, or no safetensors file; copy or download it again" if size < 9 else None
    expected = 8 + int.from_bytes(head[:8], "little")
    if size >= expected:
        with open(path, "rb") as stream:
            text = stream.read(expected)[8:]
        try:
            ends = [entry["data_offsets"][1] for key, entry in json.loads(text).items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
        expected += max(ends, default=0)
    return f"is cut off: {size} of {expected} bytes are there; copy or download it again" if size < expected else None
