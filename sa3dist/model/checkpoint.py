"""Base checkpoints: tensors read one by one from the mapped file, strict checks of their keys, digests of tensors."""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sa3dist.errors import CheckpointError
from sa3dist.formats import digest_of, file_sha256
from sa3dist.model import staged_reads


class CheckpointFile:
    """One safetensors file. Opening reads only its header; tensors are read one by one on request."""

    def __init__(self, path: Path):
        self.path = Path(path)
        # Kept open: opening parses the whole header (1000 tensors: 6.6 s when opened for each, 0.4 s once).
        self._opened: dict[str, Any] = {}
        file = self._open()
        # Slices read only the header.
        self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        # Opened now, so that both readers see the file that was checked even if it is replaced later.
        self._opened["staged"] = staged_reads.StagedFile(self.path)

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be pickled; a copy opens its own.
        return {**vars(self), "_opened": {}}

    def _open(self, device: torch.device | str = "cpu"):
        from safetensors import SafetensorError, safe_open

        try:
            if str(device) not in self._opened:
                self._opened[str(device)] = safe_open(str(self.path), framework="pt", device=str(device))
            return self._opened[str(device)]
        except FileNotFoundError as error:
            # safetensors raises this also for missing permissions.
            reason = "cannot be read; check its permissions" if self.path.exists() else "no such file"
            raise CheckpointError(f"{self.path}: {reason}") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: not a readable safetensors file ({error})") from error

    def read(self, name: str, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """One tensor on ``device`` in ``dtype``; on the CPU in its own dtype it stays a view of the mapped file."""
        if staged_reads.staged(device) and self._staged.holds(name):
            return self._staged.read(name, device, dtype)
        return self._open(device).get_tensor(name).to(dtype)

    @property
    def _staged(self) -> staged_reads.StagedFile:
        if "staged" not in self._opened:
            self._opened["staged"] = staged_reads.StagedFile(self.path)
        return self._opened["staged"]

    @functools.cached_property
    def digest(self) -> str:
        return file_sha256(self.path)


def tensor_shapes(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


def tensors_sha256(weights, names: list[str], described: str) -> str:
    """SHA-256 over a description and the named tensors in that order, by name and float32 values, as hex."""
    state = hashlib.sha256(described.encode())
    for name in names:
        tensor = weights.read(name, None, "cpu", torch.float32).contiguous()
        state.update(name.encode())
        state.update(tensor.view(-1).numpy())
    return state.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and float32 values, in the given order."""
    state = hashlib.sha256()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu", torch.float32).contiguous()
        state.update(digest_of(name, str(tuple(value.shape)), value.numpy().tobytes()).encode())
    return state.hexdigest()


def differences(expected: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]]) -> str:
    """Up to three names each of missing, unexpected and misshapen tensors, as text; empty if there are none."""
    shared = [key for key in expected if key in found]
    kinds = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of the wrong shape": [
            f"{key} is {list(found[key])}, expected {list(expected[key])}"
            for key in shared
            if tuple(found[key]) != tuple(expected[key])
        ],
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join([*names[:3], *(['...'] if len(names) > 3 else [])])})"
        for kind, names in kinds.items()
        if names
    )


def check_keys(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raises CheckpointError when the two inventories differ in any way."""
    if problems := differences(expected, found):
        raise CheckpointError(
            f"{path}: the tensors do not fit model_config.json beside it ({problems}); "
            "is this a complete, unmodified Stable Audio 3 checkpoint?"
        )


def fill(module: nn.Module, prefix: str, weights, device: torch.device | str, dtype: torch.dtype) -> None:
    """Load every parameter and buffer of ``module``, which is on the meta device, and freeze it.

    weights  CheckpointFile, or anything with the same ``read``
    Rotary frequencies stay float32 whatever ``dtype`` is.
    """
    shapes = tensor_shapes(module, prefix)

    def read(key: str) -> Tensor:
        return weights.read(key, shapes[key], device, torch.float32 if key.endswith("inv_freq") else dtype)

    names = [key[len(prefix) :] for key in shapes]
    state = dict(zip(names, staged_reads.in_threads(read, shapes, device), strict=True))
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()
