"""Part ``tests``: the gpu-marked tests, file by file in fresh processes, each result recorded as it comes.

The same module is the pytest plugin that records: a test that kills its process leaves the results before it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from results_file import ROOT, Budget, ResultsFile

RESULTS_VARIABLE = "SA3DIST_GPU_RESULTS"
# Read by tests/conftest.py: where gpu-marked tests run.
DEVICE_VARIABLE = "SA3DIST_TEST_DEVICE"
# Least seconds in which starting one more file makes sense.
SHORTEST_FILE = 20.0


def run(results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> bool:
    """Returns whether every test that ran passed, and all files ran. ``tiny`` runs a part of the first file."""
    results.set(skipped=[], files=[])
    files = gpu_files(device)
    for path in files[:1] if tiny else files:
        if not budget.allows(SHORTEST_FILE):
            results.content["skipped"].append({"file": path.name, "why": "time budget"})
            results.write()
            continue
        selection = ["-k", "bora"] if tiny else []
        code = run_file(path, results.path, budget.left(), device, selection)
        # The child has written its tests into the same file.
        results.content = ResultsFile.reopen(results.path).content
        results.content["files"].append({"file": path.name, "exit_code": code})
        results.write()
    outcomes = [row["outcome"] for row in results.rows]
    results.set(summary={outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))})
    finished = all(entry["exit_code"] == 0 for entry in results.content["files"])
    return finished and bool(outcomes) and "failed" not in outcomes and not results.content["skipped"]


def gpu_files(device: torch.device) -> list[Path]:
    """Test files marked gpu as a whole; on a CPU only those that take their device from the environment."""
    named = sorted((ROOT / "tests").glob("test_*gpu*.py"))
    marked = [path for path in named if "\npytestmark = pytest.mark.gpu\n" in path.read_text(encoding="utf-8")]
    return [path for path in marked if device.type == "cuda" or path.name.startswith("test_gpu_")]


def run_file(path: Path, results: Path, seconds: float, device: torch.device, selection: list[str]) -> int | str:
    """Exit code of pytest, or what ended it. Missing pytest is an exit code too: 1."""
    here = Path(__file__).resolve().parent
    paths = [str(ROOT), str(ROOT / "kernels"), str(here), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        RESULTS_VARIABLE: str(results.resolve()),
        DEVICE_VARIABLE: device.type,
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "--tb=short",
        "-p",
        "check_tests",
        str(path),
        *selection,
    ]
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"


def pytest_runtest_logreport(report) -> None:
    """Append one test's outcome: its call, or its setup when that did not pass."""
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.outcome == "failed":
            row["why"] = report.longreprtext[-2000:]
        if report.outcome == "skipped":
            row["why"] = str(report.longrepr[2])
        row |= dict(report.user_properties)
        ResultsFile.reopen(Path(os.environ[RESULTS_VARIABLE])).add(**row)
