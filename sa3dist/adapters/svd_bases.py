"""The singular bases of -xs layers, computed once per base and cached on disk.

They depend only on the base's weights. Computing them for all layers of the medium model takes a CPU minutes.

Legend: O fan_out, I fan_in, R rank.
"""

import contextlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sa3dist.formats import digest_of
from sa3dist.model.checkpoint import tensors_digest
from sa3dist.model.rewrite_safetensors import write_safetensors

log = logging.getLogger(__name__)

Bases = tuple[torch.Tensor, torch.Tensor]
# The algorithm: part of the cache's key and of a checkpoint's identity, because a trained core only fits its bases.
# Change the value whenever a change moves bases by more than rounding.
METHOD = "float64"
# Smallest singular value, relative to the largest, for the Gram matrix. Squaring costs the direction of singular value
# s a factor S / 2s of accuracy, with S the largest: here three of sixteen digits.
MIN_RELATIVE_VALUE = 1e-3
# Entries that differ by less than this factor count as equal, so that rounding does not decide which one sets the sign.
EQUAL_TOLERANCE = 1e-9


def singular_bases(weight_OI: torch.Tensor, rank: int) -> Bases:
    """The leading ``rank`` left and right singular vectors, (O, rank) and (I, rank), with unique signs.

    Computed in float64 and rounded once, so that machines agree to a last bit; inference recomputes them by float32
    SVD, whose own error is up to 3e-5 (a random 1536 x 6144). Uses the smaller Gram matrix, on the weight's device; if
    squaring would lose too much, SVD on the CPU. Vectors of equal singular values are not unique.
    The sign rule is part of the file format: the entry of largest absolute value in each left vector (the first of
    equals) is positive.
    """
    weight_OI = weight_OI.detach().double()
    bases = gram_bases(weight_OI, rank)
    if bases is None:
        left_OR, _, right_RI = torch.linalg.svd(weight_OI.cpu(), full_matrices=False)
        bases = left_OR[:, :rank], right_RI[:rank].t()
    left_OR, right_IR = bases
    sizes_OR = left_OR.abs()
    leading_1R = (sizes_OR >= sizes_OR.amax(0) * (1 - EQUAL_TOLERANCE)).int().argmax(0, keepdim=True)
    signs = torch.where(left_OR.gather(0, leading_1R) < 0, -1.0, 1.0)
    return tuple((side * signs).float().cpu().contiguous() for side in (left_OR, right_IR))


def gram_bases(weight_OI: torch.Tensor, rank: int) -> Bases | None:
    """``singular_bases`` in float64, up to signs, on the weight's device; None if squaring would lose too much.

    The nine layers of a block of the medium model take 9.8 s of a core; SVD 17.8 s in float32, 32.9 in float64.
    """
    tall = weight_OI.shape[0] >= weight_OI.shape[1]
    long_XY = (weight_OI if tall else weight_OI.t()).double()
    values_Y, vectors_YY = torch.linalg.eigh(long_XY.t() @ long_XY)
    squares_R, short_YR = values_Y[-rank:].flip(0), vectors_YY[:, -rank:].flip(1)
    if not bool(squares_R[-1] > MIN_RELATIVE_VALUE**2 * squares_R[0]):
        return None
    long_XR = (long_XY @ short_YR) / squares_R.sqrt()
    return (long_XR, short_YR) if tall else (short_YR, long_XR)


class BasesCache:
    """Singular bases of one base's layers on disk, a file per layer, rank and METHOD.

    A damaged file is logged and replaced.

    directory     created with the first file
    base_digest   ``Base.weights_digest()``
    device        where missing bases are computed
    """

    def __init__(self, directory: Path, base_digest: str, device: torch.device) -> None:
        self.directory = Path(directory)
        self.base_digest = base_digest
        self.device = device

    def path(self, layer: str, rank: int) -> Path:
        key = digest_of("singular bases", METHOD, self.base_digest, layer, str(rank))
        return self.directory / f"{key}.safetensors"

    def __call__(self, layer: str, weight_OI: torch.Tensor, rank: int) -> Bases:
        """The bases of a layer, from its file; if there is none, computed and stored."""
        path = self.path(layer, rank)
        stored = self._read(path)
        if stored is not None:
            return stored
        left_OR, right_IR = singular_bases(weight_OI.to(self.device), rank)
        tensors = {"left": left_OR, "right": right_IR}
        write_safetensors(path, tensors, {"sha256": tensors_digest(tensors)})
        return left_OR, right_IR

    def _read(self, path: Path) -> Bases | None:
        if not path.exists():
            return None
        tensors, metadata = {}, {}
        with contextlib.suppress(SafetensorError), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("left", "right")}
        if tensors_digest(tensors) != metadata.get("sha256"):
            log.warning("%s: damaged; these singular bases are computed again", path)
            return None
        return tensors["left"], tensors["right"]
