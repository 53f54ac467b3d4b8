"""The sums over tokens of a block's modulations: our operation against what the compiler makes of them, one GPU.

    python kernels/benchmarks/bench_token_sums.py [--sweep] [--json FILE]

The four sums of a block that wait for one another (two gates, two norms), in bfloat16, as graphs that are replayed.
Every call of a graph reads other tensors, more than the device's cache holds: milliseconds of a block, and GB/s of what
must be read once. --sweep tries other tiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from sa3dist_kernels.token_sums import TILES, Tiles, TokenSum, token_sums
from timing import interleaved

TOKENS, WIDTH = (387, 2000, 4155), 1536
TINY_TOKENS, TINY_WIDTH = (12,), 16
# Bytes that one graph reads at least: several times an H100's cache.
BYTES = 256 << 20
SWEEP = [
    TILES,
    TILES._replace(programs=1056),
    TILES._replace(programs=396),
    TILES._replace(programs=1056, depth=2),
    TILES._replace(depth=8),
    TILES._replace(channels=256, tokens=4),
    TILES._replace(channels=64, tokens=16, depth=2),
    TILES._replace(channels=256, warps=8),
]


def blocks(K: int, E: int, device: torch.device) -> list[list[TokenSum]]:
    """The sums of as many blocks as together are more than the cache."""
    count = max(1, min(64, -(-BYTES // (8 * 2 * K * E)))) if device.type == "cuda" else 1
    draw = torch.Generator(device).manual_seed(K)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=dtype)

    def block() -> list[TokenSum]:
        pairs = [(normal(1, K, E), normal(1, K, E)) for _ in range(4)]
        norm = [(normal(1, K, 1, dtype=torch.float32).exp(), normal(E)) for _ in range(2)]
        gates = [TokenSum(*pairs[0], bias_E=normal(E)), TokenSum(*pairs[1])]
        return [*gates, TokenSum(*pairs[2], *norm[0]), TokenSum(*pairs[3], *norm[1])]

    return [block() for _ in range(count)]


def as_compiled(sums: list[TokenSum]) -> list[torch.Tensor]:
    """As the backward pass of a block writes them, two kernels a sum."""
    found = []
    for left, right, rows, scale, bias in sums:
        x = right if bias is None else right + bias
        if rows is not None:
            x = (right.float() * rows * scale).to(right.dtype)
            found.append(left.sum([0, 1]))
        found.append((left * x).sum([0, 1]))
    return found


def replayed(run: Callable[[list[TokenSum]], list], given: list[list[TokenSum]], device: torch.device) -> Callable:
    """``run`` of every block in turn, as one graph on CUDA."""

    def calls() -> None:
        for block in given:
            run(block)

    calls()
    if device.type != "cuda":
        return calls
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="other tiles too")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write all rows there")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, E = (TOKENS, WIDTH) if device.type == "cuda" else (TINY_TOKENS, TINY_WIDTH)
    # The same program for all lengths, as in training.
    compiled = torch.compile(as_compiled, dynamic=True) if device.type == "cuda" else as_compiled
    rows: list[dict] = []
    for K in tokens:
        given = blocks(K, E, device)
        variants = {"compiler": replayed(compiled, given, device)}
        for tiles in SWEEP if options.sweep else SWEEP[:1]:
            run = lambda block, tiles=tiles: token_sums(block, tiles=tiles)  # noqa: E731
            variants[str(tuple(tiles))] = replayed(run, given, device)
        far = max(
            float((ours.float() - exact.float()).norm() / exact.float().norm())
            for ours, exact in zip(token_sums(given[0]), token_sums(given[0], impl="torch"), strict=True)
        )
        for name, times in interleaved(variants, options.repeats, device, warm_up=2).items():
            each = statistics.median(times) / len(given)
            rate = 8 * 2 * K * E / each / 1e6
            row = {"tokens": K, "kernel": name, "milliseconds": each, "gb_per_s": rate, "distance": far}
            rows.append(row)
            print(f"{K:5} tokens {name:24} {each:8.4f} ms a block {rate:7.0f} GB/s", flush=True)
        print(f"{K:5} tokens: {far:.1e} from torch", flush=True)
        # Graphs keep what they read.
        del variants, given
    if options.json:
        options.json.write_text(json.dumps({"fields": list(Tiles._fields), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
