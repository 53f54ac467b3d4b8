"""Row norms, gains and the gradient they send back, from thin products: one launch each against torch.

    python kernels/benchmarks/bench_thin_norms.py --out thin_norms.json

materialised  the norms of W0 + s L R itself, formed in float32
"""

from __future__ import annotations

import functools

import op_bench
import torch
from sa3dist_kernels.thin_norms import (
    thin_norms,
    thin_norms_backward,
    thin_norms_backward_reference,
    thin_norms_reference,
)
from sa3dist_kernels.weight_norms import EPS

SCALE = 1.0


def materialised(weight, left, right, magnitude):
    norms = torch.linalg.vector_norm(weight.float() + SCALE * left @ right, dim=1)
    return magnitude / (norms + EPS), norms


def make_variants(device, dtype, tokens, fan_in, fan_out, rank) -> op_bench.Variants:
    def normal(*shape):
        return torch.randn(shape, device=device)

    weight, left, right = normal(fan_out, fan_in).to(dtype), normal(fan_out, rank), normal(rank, fan_in)
    squares, magnitude, slope = weight.float().square().sum(1), normal(fan_out), normal(fan_out)
    thin = weight.float() @ right.t(), left, right @ right.t()
    forward, backward = (*thin, squares, magnitude, SCALE, EPS), (*thin, slope, SCALE)
    variants = {
        "norms torch": lambda: thin_norms_reference(*forward),
        "norms compiled": functools.partial(torch.compile(thin_norms_reference, dynamic=False), *forward),
        "norms materialised": lambda: materialised(weight, left, right, magnitude),
        "gradient torch": lambda: thin_norms_backward_reference(*backward),
        "gradient compiled": functools.partial(torch.compile(thin_norms_backward_reference, dynamic=False), *backward),
    }
    if op_bench.runs_triton(device):
        variants["norms triton"] = lambda: thin_norms(*forward)
        variants["gradient triton"] = lambda: thin_norms_backward(*backward)
    return variants


if __name__ == "__main__":
    op_bench.main(__doc__, make_variants)
