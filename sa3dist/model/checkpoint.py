"""Reading a base checkpoint: strict about its keys, straight from the mapped file to device and dtype."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sa3dist.errors import CheckpointError

DIGEST_CHUNK_BYTES = 16 << 20


class CheckpointFile:
    """One safetensors file. Only its header is read here; tensors are read one by one when asked for."""

    def __init__(self, path: Path):
        self.path = Path(path)
        # Opening reads the whole header: once per tensor it is most of a load (1000 tensors: 6.6 s against 0.4 s).
        self._opened: dict[str, Any] = {}
        file = self._open()
        # A tensor of the file is known by its slice: nothing but the header is touched.
        self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    def __getstate__(self) -> dict[str, Any]:
        # An open file cannot be copied; the copy opens its own.
        return {**vars(self), "_opened": {}}

    def _open(self, device: torch.device | str = "cpu"):
        from safetensors import SafetensorError, safe_open

        try:
            if str(device) not in self._opened:
                self._opened[str(device)] = safe_open(str(self.path), framework="pt", device=str(device))
            return self._opened[str(device)]
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path}: no such file") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: not a readable safetensors file ({error})") from error

    def read(self, name: str, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """One tensor on ``device`` in ``dtype``; on the CPU in its own dtype it stays a view of the mapped file."""
        return self._open(device).get_tensor(name).to(dtype)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the file, as hex; streamed, so it costs no memory."""
        state = hashlib.sha256()
        with self.path.open("rb") as stream:
            while chunk := stream.read(DIGEST_CHUNK_BYTES):
                state.update(chunk)
        return state.hexdigest()


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


def check_keys(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raises CheckpointError naming up to three keys when the two inventories differ in any way."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [
        f"{key} is {list(found[key])}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong)]
    parts = [f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in problems if names]
    if parts:
        raise CheckpointError(
            f"{path}: the tensors do not fit model_config.json beside it ({'; '.join(parts)}); "
            "is this a complete, unmodified Stable Audio 3 checkpoint?"
        )


def fill(module: nn.Module, prefix: str, weights, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give every parameter and buffer of ``module`` (on the meta device) its value; nothing learns.

    weights  CheckpointFile, or anything with the same ``read``
    Rotary frequencies stay float32 whatever ``dtype`` is.
    """
    state = {
        key[len(prefix) :]: weights.read(key, shape, device, torch.float32 if key.endswith("inv_freq") else dtype)
        for key, shape in tensor_shapes(module, prefix).items()
    }
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()
