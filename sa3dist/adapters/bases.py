"""The singular bases of -xs layers: found once per base, kept on disk, shared out among the processes.

They depend on the base's weights alone; a thin SVD of every layer of the medium model takes a CPU minutes.
Layouts: O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sa3dist.formats import atomic_path, digest_of

log = logging.getLogger(__name__)

Bases = tuple[torch.Tensor, torch.Tensor]
# Singular values below this share of the largest: directions that squaring the weight, even in float64, has blurred.
SMALLEST_SHARE = 1e-6


def singular_bases(weight_OI: torch.Tensor, rank: int) -> Bases:
    """The leading ``rank`` left and right singular vectors, (O, rank) and (I, rank), with signs made unique.

    On the CPU by float32 SVD, as inference recomputes them; a weight on another device is decomposed there, in float64
    by way of its smaller Gram matrix, which is nearer to the truth than the float32 SVD.
    The sign rule is part of the file format: the entry of largest absolute value in every left vector (the first of
    equals) is positive.
    """
    weight_OI = weight_OI.detach()
    found = None if weight_OI.device.type == "cpu" else gram_bases(weight_OI, rank)
    if found is None:
        left_OR, _, right_RI = torch.linalg.svd(weight_OI.cpu().float(), full_matrices=False)
        found = left_OR[:, :rank], right_RI[:rank].t()
    left_OR, right_IR = found
    leading = left_OR.gather(0, left_OR.abs().argmax(0, keepdim=True))
    signs = torch.where(leading < 0, -1.0, 1.0)
    return tuple((side * signs).float().cpu().contiguous() for side in (left_OR, right_IR))


def gram_bases(weight_OI: torch.Tensor, rank: int) -> Bases | None:
    """``singular_bases`` in float64 up to signs, where the weight is; None for a weight of too low a rank."""
    tall = weight_OI.shape[0] >= weight_OI.shape[1]
    long_XY = (weight_OI if tall else weight_OI.t()).double()
    values_Y, vectors_YY = torch.linalg.eigh(long_XY.t() @ long_XY)
    squares_R, short_YR = values_Y[-rank:].flip(0), vectors_YY[:, -rank:].flip(1)
    if not bool(squares_R[-1] > SMALLEST_SHARE**2 * squares_R[0]):
        return None
    long_XR = (long_XY @ short_YR) / squares_R.sqrt()
    return (long_XR, short_YR) if tall else (short_YR, long_XR)


class BasesCache:
    """Singular bases of one base's layers, one file per layer and rank; a damaged file is made anew, and said.

    directory     made when the first file is
    base_digest   ``Base.weights_digest()``
    device        where missing bases are found
    """

    def __init__(self, directory: Path, base_digest: str, device: torch.device) -> None:
        self.directory = Path(directory)
        self.base_digest = base_digest
        self.device = device

    def path(self, layer: str, rank: int) -> Path:
        return self.directory / f"{digest_of('singular bases', self.base_digest, layer, str(rank))}.safetensors"

    def __call__(self, layer: str, weight_OI: torch.Tensor, rank: int) -> Bases:
        """The bases of a layer, from its file; without one they are found now, and kept."""
        path = self.path(layer, rank)
        kept = self._read(path)
        if kept is not None:
            return kept
        left_OR, right_IR = singular_bases(weight_OI.to(self.device), rank)
        tensors = {"left": left_OR, "right": right_IR}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"sha256": _digest(tensors)}))
        return left_OR, right_IR

    def _read(self, path: Path) -> Bases | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            tensors = load(content)
            # The first 8 bytes of a safetensors file are the length of its JSON header.
            expected = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["sha256"]
        except (ValueError, KeyError, SafetensorError):
            tensors, expected = {}, ""
        if _digest(tensors) != expected:
            log.warning("%s: not as it was written; these singular bases are made anew", path)
            return None
        return tensors["left"], tensors["right"]


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(digest_of(name, str(tuple(tensors[name].shape)), tensors[name].numpy().tobytes()).encode())
    return state.hexdigest()
