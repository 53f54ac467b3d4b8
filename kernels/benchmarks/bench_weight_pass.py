"""BoRA's read of the frozen weight, W0^2 weighted by the rows' gains and L^T W0: one launch against torch.

    python kernels/benchmarks/bench_weight_pass.py --out weight_pass.json

copy      the weight copied once: what reading and writing it costs
torch     in float32, a block of rows at a time (``weight_norms``); compiled: the maths through torch.compile
"""

from __future__ import annotations

import functools

import op_bench
import torch
from sa3dist_kernels.weight_norms import _squares_and_left, _squares_and_right
from sa3dist_kernels.weight_pass import weight_pass, weight_pass_reference


def make_variants(device, dtype, tokens, fan_in, fan_out, rank) -> op_bench.Variants:
    def normal(*shape):
        return torch.randn(shape, device=device)

    weight, copied = normal(fan_out, fan_in).to(dtype), torch.empty(fan_out, fan_in, device=device, dtype=dtype)
    left, right = normal(fan_out, rank), normal(rank, fan_in)
    rows, columns = normal(fan_out).square(), normal(fan_in)
    compiled = torch.compile(weight_pass_reference, dynamic=False)
    variants = {
        "copy": lambda: copied.copy_(weight),
        "rows torch": lambda: _squares_and_left(weight, rows, left)[::-1],
        "rows compiled": functools.partial(compiled, weight, left, rows),
        "columns torch": lambda: _squares_and_right(weight, columns, right)[::-1],
        "columns compiled": functools.partial(compiled, weight.t(), right.t(), columns),
    }
    if op_bench.runs_triton(device):
        variants["rows triton"] = lambda: weight_pass(weight, left, rows)
        variants["columns triton"] = lambda: weight_pass(weight.t(), right.t(), columns)
    return variants


if __name__ == "__main__":
    op_bench.main(__doc__, make_variants)
