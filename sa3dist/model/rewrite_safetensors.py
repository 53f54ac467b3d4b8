"""Writes safetensors files: new ones, or copies with some tensors changed, one tensor in memory at a time."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch

from sa3dist.errors import CheckpointError, EnvironmentFailure
from sa3dist.formats import atomic_path, write_whole

COPY_BYTES = 16 << 20
# safetensors' names of the dtypes a weight may be stored in.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file atomically; equal contents give equal bytes. If it has ModelSpec metadata, adds the hash."""
    data = io.BytesIO(safetensors.torch.save(dict(tensors), dict(metadata)))
    header, start = read_header(data, path)
    if "modelspec.sai_model_spec" in metadata:
        # The hash covers all bytes behind the header.
        header["__metadata__"]["modelspec.hash_sha256"] = f"0x{hashlib.sha256(data.getbuffer()[start:]).hexdigest()}"
    # Sorted: the order in which safetensors writes metadata changes from run to run.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    # Not save_file, which writes a file that only its owner can read.
    write_whole(path, _header_bytes(header) + data.read())


def rewrite_checkpoint(
    source: Path, target: Path, changed: Mapping[str, Callable[[], torch.Tensor]], metadata: Mapping[str, str]
) -> None:
    """Copy a safetensors file by rename, with new values for the keys of ``changed`` and more header entries.

    changed   key -> function that returns the tensor in the stored shape; it is rounded to the stored dtype
    Raises EnvironmentFailure, naming the tensor and leaving an older ``target`` in place, for a value that is not
    finite in that dtype; CheckpointError if a changed key is missing or of another shape.
    """
    with Path(source).open("rb") as read:
        header, start = read_header(read, source)
        old_metadata = header.pop("__metadata__", {})
        missing = changed.keys() - header.keys()
        if missing:
            raise CheckpointError(f"{source}: has no tensor {min(missing)}")
        with atomic_path(target) as temporary, temporary.open("wb") as write:
            write.write(_header_bytes({"__metadata__": {**old_metadata, **metadata}, **header}))
            for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                if key in changed:
                    _write_tensor(write, key, changed[key](), entry)
                else:
                    _copy(read, write, start + begin, end - begin)


def read_header(file: BinaryIO, path: str | Path) -> tuple[dict, int]:
    """The JSON header and the offset of the data. Raises CheckpointError for anything but a safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    try:
        return json.loads(file.read(length)), 8 + length
    except ValueError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _header_bytes(header: dict) -> bytes:
    """The start of a safetensors file, up to its data."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The format pads the header with spaces, so that tensor data is aligned to 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, key: str, value: torch.Tensor, entry: dict) -> None:
    if entry["dtype"] not in DTYPES or list(value.shape) != entry["shape"]:
        raise CheckpointError(f"{key} is {entry['dtype']} {entry['shape']} in the file, expected {list(value.shape)}")
    value = value.detach().to("cpu", DTYPES[entry["dtype"]]).contiguous()
    if not value.isfinite().all():
        raise EnvironmentFailure(
            f"{key} would hold values that are not finite in {entry['dtype']}: nothing was written"
        )
    file.write(value.flatten().view(torch.uint8).numpy())


def _copy(read: BinaryIO, write: BinaryIO, offset: int, count: int) -> None:
    read.seek(offset)
    while count:
        piece = read.read(min(count, COPY_BYTES))
        if not piece:
            raise CheckpointError(f"{read.name}: ends before its last tensor; the file is cut off")
        write.write(piece)
        count -= len(piece)
