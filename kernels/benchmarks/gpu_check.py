"""Runs all checks that need a CUDA device, in parts, from the source tree alone.

    PYTHONPATH=.:kernels python kernels/benchmarks/gpu_check.py tests|step|ops|run|ranks|all

Each part has a time budget: it starts nothing that would exceed it, and lists what it skipped. A part that hangs ends
itself after its budget and says where it was. ``all`` runs the parts in turn, each in its own process, and ends within
eleven minutes in any case. Results are written to $OUT/gpu_<part>.json (default: kernels/benchmarks/results) as they
come, so that a part that is killed keeps its measurements.
Exit codes: 0 the part passed; 1 something failed or disagreed; 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil
import torch
from results_file import Budget, ResultsFile, tell_choices

# Part name -> module with run(results, budget, device, tiny) -> passed. Imported when chosen, so that a failed import
# only affects its part. In the order in which ``all`` runs them: the most informative first.
PARTS = {
    "step": "check_step",
    "tests": "check_tests",
    "run": "check_run",
    "ranks": "check_ranks",
    "ops": "check_ops",
}
# From the start of a part's process to its end.
BUDGET_SECONDS = {"step": 200.0, "tests": 150.0, "run": 200.0, "ranks": 50.0, "ops": 60.0}
ALL = "all"
ALL_SECONDS = 650.0
# ``all`` kills a part this long after the end of its budget.
GRACE_SECONDS = 10.0
# A part that runs alone ends itself this long after its budget, because its current measurement may still complete.
LATE_SECONDS = 30.0
KILLED = "killed at the end of its time"
# With less time left, a part is not started.
MIN_SECONDS = 15.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, ALL])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU: checks the check")
    parser.add_argument("--seconds", type=float, help="the budget, in place of the part's own")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or BUDGET_SECONDS.get(options.part, ALL_SECONDS)
    return options


def main(arguments: list[str] | None = None) -> int:
    begin, spent = time.monotonic(), max(0.0, time.time() - psutil.Process().create_time())
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; run it where there is one, or try --device cpu --tiny", file=sys.stderr)
        return 2
    if arguments is not None:
        # Called from a test: the process is older than this part.
        spent = 0.0
    budget = Budget(options.seconds - spent)
    if options.part == ALL:
        return run_all(options, budget)
    if options.tiny:
        # Tiny models gain nothing from more threads.
        torch.set_num_threads(1)
    device = torch.device(options.device)
    if options.device == "cuda" and importlib.util.find_spec("cudnn") is None:
        print("gpu-check: no nvidia-cudnn-frontend here: attention is not what a run has", file=sys.stderr, flush=True)
    results = ResultsFile.start(results_path(options.part), device, vars(options))
    passed = False
    watch = threading.Timer(budget.left() + LATE_SECONDS, end_late, (results.path,))
    watch.daemon = True
    watch.start()
    # Where the interpreter is held this still comes.
    faulthandler.dump_traceback_later(budget.left() + LATE_SECONDS + GRACE_SECONDS, exit=True, file=sys.__stderr__)
    try:
        passed = importlib.import_module(PARTS[options.part]).run(results, budget, device, options.tiny)
        results.set(state="finished")
    except Exception as problem:
        traceback.print_exc()
        results.set(state="failed", problem=f"{type(problem).__name__}: {problem}")
    finally:
        watch.cancel()
        faulthandler.cancel_dump_traceback_later()
    results.set(passed=passed, seconds=round(spent + time.monotonic() - begin, 1))
    print(f"gpu-check {options.part}: {'passed' if passed else 'FAILED'}, {results.path}", flush=True)
    return 0 if passed else 1


def results_path(part: str) -> Path:
    return Path(os.environ.get("OUT") or Path(__file__).resolve().parent / "results") / f"gpu_{part}.json"


def run_all(options: argparse.Namespace, budget: Budget) -> int:
    """Run all parts in order; 0 if all passed. Parts are killed at the end of their time or of the total."""
    outcomes = {}
    for part in PARTS:
        seconds = min(BUDGET_SECONDS[part], budget.left() - GRACE_SECONDS)
        if seconds < MIN_SECONDS:
            outcomes[part] = "left out: time budget"
            continue
        words = [part, "--device", options.device, "--seconds", f"{seconds:.0f}", *(["--tiny"] if options.tiny else [])]
        begin = time.monotonic()
        # A process group of its own.
        process = subprocess.Popen([sys.executable, __file__, *words], start_new_session=True)
        try:
            code = process.wait(seconds + GRACE_SECONDS)
            outcomes[part] = "passed" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            kill_tree(process)
            if results_path(part).exists():
                ResultsFile.reopen(results_path(part)).set(state=KILLED, passed=False)
            outcomes[part] = f"FAILED: {KILLED}"
        outcomes[part] += f", {time.monotonic() - begin:.0f} s"
    for part, outcome in outcomes.items():
        print(f"gpu-check {part}: {outcome}", flush=True)
    return 0 if all(outcome.startswith("passed") for outcome in outcomes.values()) else 1


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and its descendants, including those in other sessions."""
    first = psutil.Process(process.pid)
    kill([first, *first.children(recursive=True)])
    process.wait()


def end_late(results: Path) -> None:
    """End this process, which hangs, and its descendants; it says where it was. results: its file."""
    faulthandler.dump_traceback(sys.__stderr__)
    # As it is on disk: another process may have added to it.
    ResultsFile.reopen(results).set(state=KILLED, passed=False)
    kill(psutil.Process().children(recursive=True))
    os._exit(1)


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    tell_choices()
    sys.exit(main())
