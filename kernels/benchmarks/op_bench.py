"""What the benchmarks of single ops share: variants measured in turn at real sizes, as a table and as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from results_file import ResultsFile
from sa3dist_kernels import triton_support
from timing import interleaved, peak_bytes, summary

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# fan_in, fan_out of the medium model's largest and most frequent layers.
MEDIUM = ((1536, 12288), (1536, 7680), (1536, 1536), (6144, 1536))
TINY = ((48, 80),)
Variants = dict[str, Callable[[], object]]


def runs_triton(device: torch.device) -> bool:
    """Whether the kernels can be measured here; the interpreter's times mean nothing but that they run."""
    return device.type == "cuda" or triton_support.interpreting()


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[387, 4160], help="30 s and 380 s behind 64 memory tokens"
    )
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="one small layer: checks the benchmark")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after every row")
    return parser.parse_args()


def main(description: str, make_variants: Callable[..., Variants]) -> None:
    """``make_variants(device, dtype, tokens, fan_in, fan_out, rank)`` names the functions to time."""
    options = parse(description)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    torch.manual_seed(0)
    named = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    results = ResultsFile.start(options.out, device, named)
    for row in measure(make_variants, options, device, dtype):
        results.add(**row)
        print(
            f"{row['fan_in']:5} -> {row['fan_out']:5} N {row['tokens']:5} r{row['rank']:<4}{row['variant']:34} "
            f"{row['milliseconds']['median']:9.4f} ms",
            flush=True,
        )
    results.set(state="finished")


def measure(make_variants, options, device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    """One row per layer, tokens, rank and variant."""
    for fan_in, fan_out in TINY if options.tiny else MEDIUM:
        for tokens in [5] if options.tiny else options.tokens:
            for rank in [3] if options.tiny else options.rank:
                variants = make_variants(device, dtype, tokens, fan_in, fan_out, rank)
                times = interleaved(variants, options.rounds, device, warm_up=3, cold=True)
                sizes = {"fan_in": fan_in, "fan_out": fan_out, "tokens": tokens, "rank": rank}
                for name, values in times.items():
                    peak = peak_bytes(variants[name], device)
                    yield {**sizes, "variant": name, "milliseconds": summary(values), "peak_bytes": peak}
