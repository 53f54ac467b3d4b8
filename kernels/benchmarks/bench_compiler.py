"""Compares compiler options for whole blocks: milliseconds and memory of a step, ours and the frozen model's.

    python kernels/benchmarks/bench_compiler.py --out compiler_choices.json

Each choice compiles anew, about 25 s on an H100. The first choice, "default", is what runs use. All are timed in one
process, the first one again at the end.
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

# Changes to ``compiled.INDUCTOR_OPTIONS``. Names with this prefix are constants of ours instead.
OURS = "sa3dist."
CHOICES: dict[str, dict] = {
    "default": {},
    # Sums over tokens in the kernel that computes the norms of the same rows, at every length, so with one program.
    "sums joined with norms": {
        "triton.mix_order_reduction": True,
        "triton.mix_order_reduction_non_strict_mode": True,
        "triton.mix_order_reduction_split_size": 16,
    },
    "autotuned pointwise": {"max_autotune_pointwise": True},
    # Saves 31.6 instead of 26.4 model widths per token and block, counted on a CPU.
    "norms saved": {"sa3dist.model.compiled.RECOMPUTE_NORMS": False},
    # The compiler's kernels instead of ours. The gate's output is then saved.
    "gate by compiler": {"sa3dist.model.dit.FUSED_GATE": False},
    "token sums by compiler": {"sa3dist.model.compiled.TOKEN_SUMS_KERNEL": False},
}
LENGTHS = (4091, 323)


@contextlib.contextmanager
def chosen(choices: dict) -> Iterator[None]:
    """A context in which sides are built and compiled with ``choices``."""
    inductor = {key: value for key, value in choices.items() if not key.startswith(OURS)}
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(compiled.INDUCTOR_OPTIONS, inductor))
        for name, value in choices.items():
            if name.startswith(OURS):
                stack.enter_context(patch(name, value))
        yield


def measured(choice: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """A row for each length."""
    side_options = types.SimpleNamespace(
        shape=options.shape, depth=options.depth, adapter_type=options.adapter_type, rank=16, precision="bf16",
        compile="auto", cuda_graphs="auto",
    )  # fmt: skip
    with chosen(CHOICES[choice]):
        sides = {name: Side(name, side_options, device) for name in ("ours", "frozen")}
        for frames in options.frames:
            row: dict = {"choice": choice, "frames": frames}
            for name, side in sides.items():
                side.use(1, frames)
                side.step()
                row[f"{name}_step_bytes"] = peak_bytes(side.step, device)
                side.record()
            times = interleaved({name: side.step for name, side in sides.items()}, options.rounds, device, 3)
            yield row | {f"{name}_ms": summary(spent) for name, spent in times.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="medium-base")
    parser.add_argument("--depth", type=int, help="blocks; the released number unless said")
    parser.add_argument("--adapter-type", default="dora-rows")
    parser.add_argument("--frames", type=int, nargs="*", default=LENGTHS, help="longest first, as in a run")
    parser.add_argument("--choice", nargs="*", choices=CHOICES, default=[*CHOICES, "default"])
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
            # Device time is scarce: time the others.
            traceback.print_exc()
            failed[name] = f"{type(problem).__name__}: {problem}"
    results.set(state="finished", failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    tell_choices()
    raise SystemExit(main())
