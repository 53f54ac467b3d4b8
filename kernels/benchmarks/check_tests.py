"""Part ``tests``: the gpu-marked tests in several processes, with each result recorded as it comes.

This module is also the pytest plugin that records results, so that a run that is killed keeps those it has.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch
from results_file import ROOT, Budget, ResultsFile

RESULTS_VARIABLE = "SA3DIST_GPU_RESULTS"
# Read by tests/conftest.py: the device of gpu-marked tests.
DEVICE_VARIABLE = "SA3DIST_TEST_DEVICE"
# The gpu mark of a file, of a test, or of one of its cases.
MARKED = re.compile(r"^pytestmark = pytest\.mark\.gpu$|^@pytest\.mark\.gpu$|marks=pytest\.mark\.gpu\b", re.MULTILINE)
# With less time left, they are not started.
MIN_SECONDS = 20.0
# Tests are mostly limited by the host. On an H100 with 16 cores ten processes took 126 s for 283 tests.
PROCESSES = 10


def run(results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> bool:
    """Whether all tests ran and passed. ``tiny`` runs part of the last file, in two processes."""
    results.set(skipped=[], exit_code=None)
    files = gpu_files(device)[-1 if tiny else None :]
    if not budget.allows(MIN_SECONDS):
        results.content["skipped"] += [{"file": path.name, "why": "time budget"} for path in files]
        results.write()
        return False
    selection = ["-k", "bora"] if tiny else []
    processes = (2 if tiny else PROCESSES) if importlib.util.find_spec("xdist") else 0
    # 5 s to end pytest and its processes.
    code = run_files(files, results.path, budget.left() - 5, device, selection, processes)
    # The child process wrote its rows into the same file.
    results.content = ResultsFile.reopen(results.path).content
    outcomes = [row["outcome"] for row in results.rows]
    summary = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    results.set(exit_code=code, processes=processes, summary=summary, files=[path.name for path in files])
    return code == 0 and bool(outcomes) and "failed" not in outcomes


def gpu_files(device: torch.device) -> list[Path]:
    """Test files with a test marked gpu; on a CPU only those that read DEVICE_VARIABLE.

    Whole steps come first and single layers last: the time limit may cut those off.
    """
    named = sorted((ROOT / "tests").rglob("test_*.py"), reverse=True)
    marked = [path for path in named if MARKED.search(path.read_text(encoding="utf-8"))]
    return [path for path in marked if device.type == "cuda" or path.name.startswith("test_gpu_")]


def run_files(
    paths: list[Path], results: Path, seconds: float, device: torch.device, selection: list[str], processes: int
) -> int | str:
    """Exit code of pytest, or why it was stopped. Without pytest it is 1. processes: 0 runs without xdist."""
    here = Path(__file__).resolve().parent
    folders = [str(ROOT), str(ROOT / "kernels"), str(here), os.environ.get("PYTHONPATH", "")]
    environment = {
        # Without pytest-xdist's variables: this process may itself be one of its workers.
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        RESULTS_VARIABLE: str(results.resolve()),
        DEVICE_VARIABLE: device.type,
        # Processes share the cores.
        "OMP_NUM_THREADS": "1",
    }
    spread = ["-n", str(processes)] if processes else []
    words = ["-m", "gpu", "-q", "--tb=short", "-p", "check_tests", *spread, *map(str, paths), *selection]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        return process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {seconds:.0f} s"


def pytest_runtest_logreport(report) -> None:
    """Record a test's outcome: of its call, or of its setup if that did not pass."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The controller gets this report too.
        return
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.outcome == "failed":
            row["why"] = report.longreprtext[-2000:]
        if report.outcome == "skipped":
            row["why"] = str(report.longrepr[2])
        row |= dict(report.user_properties)
        ResultsFile.reopen(Path(os.environ[RESULTS_VARIABLE])).add(**row)
