"""Choices of the compiler for whole blocks: milliseconds and memory of a step with each, ours and the frozen model's.

    python kernels/benchmarks/bench_compiler.py --out compiler_choices.json

Every choice compiles anew, some 25 s on an H100. What a run takes is the first, "as it is"; all are timed in one
process, and the first once more at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from results_file import ResultsFile, tell_choices
from step_sides import Side
from timing import interleaved, peak_bytes, summary

from sa3dist.model import compiled

# Beside ``compiled.CHOICES``: what begins with this is the full name of a constant of ours.
OURS = "sa3dist."
CHOICES: dict[str, dict] = {
    "as it is": {},
    # Sums over tokens in the kernel that takes the norms of the same rows, at every length: one program, as before.
    "sums beside norms": {
        "triton.mix_order_reduction": True,
        "triton.mix_order_reduction_non_strict_mode": True,
        "triton.mix_order_reduction_split_size": 16,
    },
    "several tiles tried": {"max_autotune_pointwise": True},
    # 31.6 instead of 26.4 widths a token and block, counted on a CPU.
    "more kept": {"sa3dist.model.compiled.NORMS_AGAIN": False},
    # Without kernels of ours. The gate's gradient is the compiler's, and its result is kept.
    "gate as before": {"sa3dist.model.dit.GATE_AS_ONE": False},
    "token sums as before": {"sa3dist.model.compiled.TOKEN_SUMS": False},
}
LENGTHS = (4091, 323)


@contextlib.contextmanager
def chosen(choices: dict) -> Iterator[None]:
    """Sides made and run in it are compiled so."""
    inductor = {key: value for key, value in choices.items() if not key.startswith(OURS)}
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(compiled.CHOICES, inductor))
        for name, value in choices.items():
            if name.startswith(OURS):
                stack.enter_context(patch(name, value))
        yield


def measured(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """A row for each length."""
    given = types.SimpleNamespace(
        shape=options.shape, depth=options.depth, adapter_type=options.adapter_type, rank=16, precision="bf16",
        compile="auto", cuda_graphs="auto",
    )  # fmt: skip
    with chosen(CHOICES[name]):
        sides = {side: Side(side, given, device) for side in ("ours", "frozen")}
        for frames in options.frames:
            row: dict = {"choice": name, "frames": frames}
            for side, made in sides.items():
                made.use(1, frames)
                made.step()
                row[f"{side}_step_bytes"] = peak_bytes(made.step, device)
                made.record()
            times = interleaved({side: made.step for side, made in sides.items()}, options.rounds, device, 3)
            yield row | {f"{side}_ms": summary(found) for side, found in times.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="medium-base")
    parser.add_argument("--depth", type=int, help="blocks; the released number unless said")
    parser.add_argument("--adapter-type", default="dora-rows")
    parser.add_argument("--frames", type=int, nargs="*", default=LENGTHS, help="the longest first, as in a run")
    parser.add_argument("--choice", nargs="*", choices=CHOICES, default=[*CHOICES, "as it is"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("compiler_choices.json"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    results = ResultsFile.start(options.out, device, vars(options) | {"out": str(options.out)})
    failed = {}
    for name in options.choice:
        try:
            for row in measured(name, options, device):
                results.add(**row)
                print(row, flush=True)
        except Exception as problem:
            # Device time is dear: the others are timed.
            traceback.print_exc()
            failed[name] = f"{type(problem).__name__}: {problem}"
    results.set(state="finished", failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    tell_choices()
    raise SystemExit(main())
