"""Seeded random weights under the official keys, for benchmarks on real shapes and for the tiny base."""

import fnmatch
import hashlib
import math

import torch
from torch import Tensor

from sa3dist.formats import digest_of
from sa3dist.model.base import Base
from sa3dist.model.config import ModelConfig
from sa3dist.model.loading import expected_tensors
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.released import released_config

# Key pattern -> (mean, spread) of the entries; the first match counts. Nothing has its initial value: zeros and ones
# hide wrong terms.
_VECTORS = {
    # SAME's differential attention subtracts two softmaxes: unless they are sharp, nothing remains.
    "pretransform.*.[qk]_norm.gamma": (3.0, 0.3),
    "*.gamma": (1.0, 0.1),
    "*.beta": (0.0, 0.05),
    "*.alpha": (0.7, 0.05),
    "*.bias": (0.0, 0.05),
    "*.to_scale_shift_gate": (0.0, 0.2),
    "*.memory_tokens": (0.0, 1.0),
    "*.new_tokens": (0.0, 0.2),
    "*.padding_embedding": (0.0, 1.0),
    # Audio has an RMS of about 0.1: scale it up to 1 inside SAME, and down again at the end.
    "*.encoder.*.weight_g": (10.0, 1.0),
    "*.decoder.*.weight_g": (0.1, 0.01),
    "*.scaling_factor": (1.0, 0.1),
    "*.running_std": (1.0, 0.0),
    "*.noise_scaling_factor": (0.0, 0.0),
}
# Key pattern -> gain over 1 / sqrt(fan in). Branch outputs are small so that deep stacks keep their scale; the first
# attention of SAME's encoder is not, because it alone carries the audio to the new tokens.
_GAINS = {
    "*.encoder.layers.0.transformers.0.self_attn.to_out.weight": 3.0,
    "*.to_out.weight": 0.5,
    "*.ff.ff.2.weight": 0.5,
    "*.global_cond_embedder.2.weight": 0.2,
    "*.preprocess_conv.weight": 0.2,
    "*.postprocess_conv.weight": 0.2,
}


class RandomWeights:
    """Tensors as a function of (seed, key, shape, device type), read like a checkpoint file.

    device   where values are drawn, regardless of where they are read to: a GPU fills a large base much faster
    """

    def __init__(self, config: ModelConfig, seed: int, device: torch.device | str = "cpu"):
        self.seed, self.device = seed, torch.device(device)
        self.shapes = expected_tensors(config)
        self.digest = digest_of("random weights", self.device.type, str(seed), repr(sorted(self.shapes.items())))

    def read(self, name: str, shape: tuple[int, ...] | None, device, dtype: torch.dtype) -> Tensor:
        """One tensor. ``shape`` is not used; it matches the signature of ``CheckpointFile.read``."""
        shape = self.shapes[name]
        if name.endswith("inv_freq"):
            exponents = torch.arange(shape[0], dtype=torch.float32) / shape[0]
            return (10000.0**-exponents).to(device, dtype)
        mean, spread = moments(name, shape)
        return uniform(f"{self.seed}/{name}", shape, mean, spread, self.device).to(device, dtype)


def moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's entries, by its key."""
    vector = first_match(_VECTORS, name)
    if vector is not None:
        return vector
    return 0.0, (first_match(_GAINS, name) or 1.0) / math.sqrt(math.prod(shape[1:]))


def first_match(table: dict, name: str):
    return next((value for pattern, value in table.items() if fnmatch.fnmatchcase(name, pattern)), None)


def uniform(key: str, shape: tuple[int, ...], mean: float, spread: float, device) -> Tensor:
    """Uniform float32 entries of the given moments from a generator seeded by ``key``.

    Uniform, not normal: the CPU's normals go through vector approximations that differ between processors.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    values = torch.rand(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    return values.sub_(0.5).mul_(spread * math.sqrt(12)).add_(mean)


def random_base(
    shape: str = "medium-base",
    depth: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Base:
    """A base of a released shape with random weights and no file behind it; it has no text encoder.

    shape   a released name
    depth   DiT layers; default: as released
    The same arguments give the same weights on the same kind of device. Raises CheckpointError for an unknown shape.
    """
    config = parse_model_config(released_config(shape, depth), f"random {shape}")
    return Base(config, RandomWeights(config, seed, device), device, dtype, text_source=None, encoder=False)
