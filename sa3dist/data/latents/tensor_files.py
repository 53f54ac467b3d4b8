"""Safetensors files with a digest of their content: written atomically, verified when read."""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sa3dist.errors import EnvironmentFailure
from sa3dist.formats import write_whole


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_whole(path, pack_tensors(tensors))


def pack_tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    """The bytes of a safetensors file, with the tensors' digest in its header."""
    return save(tensors, metadata={"sha256": digest_of_tensors(tensors)})


def digest_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().view(torch.uint8).numpy())
    return state.hexdigest()


def read_tensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a ``write_tensors`` file. Raises EnvironmentFailure, naming the file, if it is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EnvironmentFailure(f"{path}: cannot read the {what} ({error}); delete the file and run again") from error
    return unpack_tensors(content, path, what)


def unpack_tensors(content: bytes, path: Path, what: str, compare: bool = True) -> dict[str, torch.Tensor]:
    """The tensors in the bytes of a ``write_tensors`` file. Raises EnvironmentFailure, naming ``path``, if damaged.

    compare   verify the tensors' digest; unnecessary if the caller has verified a digest of ``content``
    """
    try:
        tensors = load(content)
        if compare:
            # A safetensors file begins with the length of its JSON header, 8 bytes.
            header = content[8 : 8 + int.from_bytes(content[:8], "little")]
            expected = json.loads(header)["__metadata__"]["sha256"]
    except (ValueError, KeyError, SafetensorError) as error:
        raise EnvironmentFailure(f"{path}: cannot read the {what} ({error}); delete the file and run again") from error
    # A NaN or infinity makes the sum non-finite, and summing takes a twentieth of the time of isfinite(). Large finite
    # values may overflow the sum, hence the second check.
    if not all(math.isfinite(tensor.sum()) or tensor.isfinite().all() for tensor in tensors.values()):
        raise EnvironmentFailure(f"{path}: the {what} hold a non-finite value; delete the file and run again")
    if compare and digest_of_tensors(tensors) != expected:
        raise EnvironmentFailure(f"{path}: the {what} do not match their digest; delete the file and run again")
    return tensors
