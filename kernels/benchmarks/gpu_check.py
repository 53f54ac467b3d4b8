"""Everything that needs a CUDA device, in four parts of under eight minutes each, from the source tree alone.

    PYTHONPATH=.:kernels python kernels/benchmarks/gpu_check.py tests|ops|step|run

Results go into $OUT/gpu_<part>.json (default: kernels/benchmarks/results) as they come, so that a part that is cut off
keeps what it measured. Exit code 0: the part passed; 1: something failed or disagreed; 2: no CUDA device here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from results_file import Budget, ResultsFile

# Part name -> module with run(results, budget, device, tiny) -> passed. Imported when chosen, so that a fault in one
# part's imports does not cost the others.
PARTS = {"tests": "check_tests", "ops": "check_ops", "step": "check_step", "run": "check_run"}
# Under eight minutes with the start of the process and the last measurement's overrun.
BUDGET_SECONDS = 400.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU: checks the check")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="start nothing that would end later")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; run it where there is one, or try --device cpu --tiny", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    folder = Path(os.environ.get("OUT") or Path(__file__).resolve().parent / "results")
    budget, begin = Budget(options.seconds), time.monotonic()
    results = ResultsFile.start(folder / f"gpu_{options.part}.json", device, vars(options))
    passed = False
    try:
        passed = importlib.import_module(PARTS[options.part]).run(results, budget, device, options.tiny)
        results.set(state="finished")
    except Exception as problem:
        traceback.print_exc()
        results.set(state="failed", problem=f"{type(problem).__name__}: {problem}")
    results.set(passed=passed, seconds=round(time.monotonic() - begin, 1))
    print(f"gpu-check {options.part}: {'passed' if passed else 'FAILED'}, {results.path}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
