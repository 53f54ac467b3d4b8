"""Name what a file is that was given as an adapter but is no safetensors file, and say how to make one of it."""

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from sa3dist.adapters.attach import SLOT
from sa3dist.data.remote.download import HEAD_BYTES, answer_instead

SUFFIX = ".safetensors"
# PyTorch before 1.6, and plain pickles: protocol 2 or newer.
_PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_PACKED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstandard"))


def what_instead(path: Path, error: Exception) -> str:
    """What ``path`` is, for a message that begins with its name, and the next move.

    error   what reading it as a safetensors file gave
    """
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.endswith(SUFFIX))
        return f"is a folder, expected an adapter file{f'; give {path / names[0]}' if names else ''}"
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as problem:
        return f"cannot be read ({problem.strerror or problem}); check the path"
    if not size:
        return "is empty; copy or download it again"
    if instead := answer_instead(head):
        return f"is {instead}"
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    if head.startswith(_PICKLE):
        return _pickle(path)
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
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return _pickle(path)
    inside = next((name for name in names if name.endswith(SUFFIX)), None)
    return f"is a zip archive; unpack it and give {f'the {inside}' if inside else 'an adapter file'} in it"


def _pickle(path: Path) -> str:
    """A pickle of PyTorch is read as tensors and plain values only: any other may run code of its maker."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged files make torch raise nearly anything.
        return (
            f"is a pickle, expected a safetensors file; torch.load(..., weights_only=True) refuses it "
            f"({type(error).__name__}): it is damaged, or holds more than tensors and plain values"
        )
    inner = content.get("state_dict") if isinstance(content, Mapping) else None
    tensors = inner if isinstance(inner, Mapping) else content if isinstance(content, Mapping) else {}
    if not any(isinstance(key, str) and f".{SLOT}." in key for key in tensors):
        held = ", ".join(map(str, list(tensors)[:3])) or type(content).__name__
        return f"is a PyTorch checkpoint without adapter tensors ({held}), expected an adapter file"
    taken = 'c["state_dict"]' if tensors is inner else "c"
    if isinstance(content.get("lora_config"), Mapping):
        return (
            "is a PyTorch checkpoint, as the reference's own trainer saves it, expected a safetensors file; two lines "
            "of Python make one:\n" + _conversion(path, taken, 'json.dumps(c["lora_config"])')
        )
    return (
        "is a PyTorch checkpoint of adapter tensors without their lora_config, expected a safetensors file; two lines "
        "of Python make one, once adapter_type and alpha are those it was trained with:\n"
        + _conversion(path, taken, repr(json.dumps(_guess(tensors))))
    )


def _conversion(path: Path, tensors: str, config: str) -> str:
    target = path.with_suffix(SUFFIX)
    if target.exists():
        target = path.with_name(f"{path.stem}-converted{SUFFIX}")
    return (
        f"import json, torch; from safetensors.torch import save_file; "
        f'c = torch.load({str(path)!r}, map_location="cpu", weights_only=True)\n'
        f"save_file({{k: v.contiguous().clone() for k, v in {tensors}.items() if torch.is_tensor(v)}}, "
        f'{str(target)!r}, {{"lora_config": {config}}})'
    )


def _guess(tensors: Mapping[str, torch.Tensor]) -> dict:
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
