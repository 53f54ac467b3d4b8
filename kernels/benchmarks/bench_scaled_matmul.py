"""The product of an adapted layer in each of its forms, forward and backward towards x, row gains (dora-rows).

    python kernels/benchmarks/bench_scaled_matmul.py --out scaled_matmul.json

frozen        the bare product x W0^T (or dy W0) by the vendor's library: the floor
torch         library product, low-rank update, gain and bias as torch ops, one pass each
compiled      the same through torch.compile
materialised  W' formed in float32, rounded, and multiplied
library ...   the library's product finished in one pass; fused ...: one kernel, with its tile N x M
"""

from __future__ import annotations

import functools

import op_bench
import torch
from sa3dist_kernels import scaled_matmul
from sa3dist_kernels.scaled_matmul import candidates


def by_torch(left, weight, thin, lift, gain, bias):
    return (left @ weight + thin @ lift) * gain + bias


def backward_by_torch(left, weight, thin, lift, gain):
    return (left * gain).to(left.dtype) @ weight + thin @ lift


def materialised(left, weight, down, lift, gain, bias):
    merged = (weight.float() + down @ lift) * gain
    return left @ merged.to(left.dtype) + bias


def make_variants(device, dtype, tokens, fan_in, fan_out, rank) -> op_bench.Variants:
    def normal(*shape):
        return torch.randn(shape, device=device)

    weight = (normal(fan_out, fan_in) / fan_in**0.5).to(dtype)
    x, grad = normal(tokens, fan_in).to(dtype), normal(tokens, fan_out).to(dtype)
    left, right = normal(fan_out, rank), normal(rank, fan_in) / fan_in**0.5
    thin = x @ right.t().to(dtype)
    gain, bias, tail = 1 + 0.1 * normal(fan_out), normal(fan_out).to(dtype), normal(rank, fan_out).to(dtype)
    forward = (x, weight.t(), thin, left.t().to(dtype), gain.to(dtype), bias)
    backward = (grad, weight, thin, right.to(dtype), gain)
    variants = {
        "forward frozen": lambda: x @ weight.t(),
        "forward torch": lambda: by_torch(*forward),
        "forward compiled": functools.partial(torch.compile(by_torch, dynamic=False), *forward),
        "forward materialised": lambda: materialised(x, weight.t(), right.t(), left.t(), gain, bias),
        "backward frozen": lambda: grad @ weight,
        "backward torch": lambda: backward_by_torch(*backward),
        "backward compiled": functools.partial(torch.compile(backward_by_torch, dynamic=False), *backward),
    }
    for config in candidates(tokens, dtype) if op_bench.runs_triton(device) else ():
        name = f"{config['form']} {config['block_n']}x{config['block_m']}"
        product = functools.partial(scaled_matmul.scaled_matmul, config=config)
        variants[f"forward {name}"] = functools.partial(
            product, x, weight.t(), thin, left.t(), 1.0, out_gain_M=gain, bias_M=bias
        )
        variants[f"backward {name}"] = functools.partial(
            product, grad, weight, thin, right, 1.0, left_gain_K=gain, tail_TK=tail
        )
    return variants


if __name__ == "__main__":
    op_bench.main(__doc__, make_variants)
