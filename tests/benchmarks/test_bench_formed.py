"""The benchmark of formed weights at tiny sizes: what it times is right, and it counts what the kernels move."""

import argparse

import pytest
import torch

pytest.importorskip("triton")
import bench_formed  # noqa: E402
from sa3dist_kernels import triton_support  # noqa: E402


@pytest.mark.skipif(not triton_support.interpreting(), reason="Triton was imported without its interpreter")
def test_every_row_holds_the_error_beside_float64_and_the_bytes_of_the_launches():
    options = argparse.Namespace(type=["bora"], rank=[3], dtype="fp32", tiny=True, sweep=False, rounds=1)
    (row,) = bench_formed.rows(options, torch.device("cpu"))
    assert max(row["error"].values()) < 8 * torch.finfo(torch.float32).eps
    weights = sum(4 * fan_out * fan_in * count for (fan_out, fan_in), count in bench_formed.TINY.items())
    # W0 three times and W' once; W0 twice; and, in layers as small as these, as much that is thin.
    assert 4 * weights < row["form_bytes"] < 8 * weights
    assert 2 * weights < row["finish_bytes"] < 6 * weights
    assert "bora          r3" in bench_formed.line(row)


def test_every_other_tile_of_a_sweep_differs_from_the_default():
    names, tiles = zip(*bench_formed.candidates(16, torch.bfloat16), strict=True)
    assert len(set(names)) == len(names)
    assert all(other != tiles[0] for other in tiles[1:])
