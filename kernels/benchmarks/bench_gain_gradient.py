"""Gradient of the row gains: read off the output, or summed from a product that was kept, or made again.

    python kernels/benchmarks/bench_gain_gradient.py --out gain_gradient.json

kept      sum of dy * p with p kept since the forward pass: N x O numbers of memory per layer
again     p made again first
triton    ``gain_gradient``; "lost" with a twentieth of the columns recomputed because their bias hides the product
"""

from __future__ import annotations

import functools

import op_bench
import torch
from sa3dist_kernels.gain_gradient import gain_gradient


def summed(grad, product):
    return (grad.float() * product.float()).sum(0)


def summed_again(grad, x, weight, thin, lift):
    return summed(grad, x @ weight + thin @ lift)


def make_variants(device, dtype, tokens, fan_in, fan_out, rank) -> op_bench.Variants:
    def normal(*shape):
        return torch.randn(shape, device=device)

    weight = (normal(fan_in, fan_out) / fan_in**0.5).to(dtype)
    x, grad, thin = (normal(tokens, side).to(dtype) for side in (fan_in, fan_out, rank))
    lift, gain, bias = normal(rank, fan_out).to(dtype), 1 + 0.1 * normal(fan_out), normal(fan_out).to(dtype)
    product = x @ weight + thin @ lift
    kept, again = (grad, product), (grad, x, weight, thin, lift)
    variants = {
        "kept": lambda: summed(*kept),
        "kept compiled": functools.partial(torch.compile(summed, dynamic=False), *kept),
        "again": lambda: summed_again(*again),
        "again compiled": functools.partial(torch.compile(summed_again, dynamic=False), *again),
    }
    if op_bench.runs_triton(device):
        hidden = bias.clone()
        hidden[::20] *= 1000
        for name, offset in (("triton", bias), ("triton lost", hidden), ("triton without bias", None)):
            y = (product.float() * gain + (0 if offset is None else offset.float())).to(dtype)
            variants[name] = functools.partial(gain_gradient, grad, y, gain, offset, x, weight, thin, lift, 1.0)
    return variants


if __name__ == "__main__":
    op_bench.main(__doc__, make_variants)
