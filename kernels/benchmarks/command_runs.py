"""Runs the trainer's command line for gpu-check: starts it in a process group, watches, stops and kills it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from results_file import ROOT

# Packages the command needs and a bare machine may lack, with their own requirements, so that a missing wheel is
# reported before anything starts.
NEEDED = (
    "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "webdataset", "braceexpand", "soundfile",
    "cffi", "rich",
)  # fmt: skip
# Wheels of such packages may be put here; git ignores it.
WHEELS = ROOT / ".whl"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
# How often metrics are read: far below the duration of a start, and no load on the trainer.
POLL_SECONDS = 0.02
# Time to stop after SIGTERM.
STOP_SECONDS = 30.0
# Characters of a command's output that are kept.
OUTPUT_CHARACTERS = 4000


class CommandFailed(RuntimeError):
    """A command did not end as expected."""


def command_environment(scratch: Path, device: torch.device) -> dict[str, str]:
    """Environment for ``python -m sa3dist.train`` from this source tree.

    Missing packages are installed from the wheels in ``.whl``, below ``scratch``. Compiler caches of this process are
    not passed on, so that the first run starts cold.
    Raises CommandFailed, naming them, if packages are missing and have no wheel.
    """
    paths = [str(ROOT), str(ROOT / "kernels")]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        wheels = sorted(str(path) for path in WHEELS.glob("*.whl"))
        absent = [name for name in missing if not any(Path(wheel).name.startswith(f"{name}-") for wheel in wheels)]
        if absent:
            raise CommandFailed(
                f"{', '.join(absent)}: not installed here; install, or put wheels with all they need in {WHEELS}"
            )
        site = scratch / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(site), *wheels], check=True)
        paths.append(str(site))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment.pop(name, None)
    if device.type == "cpu":
        # Tiny models gain nothing from more threads.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return environment


class Command:
    """One run of the trainer, from its start to its end."""

    def __init__(self, environment: dict[str, str], output_dir: Path, words: list[str], ranks: int = 1) -> None:
        """ranks: if above 1, start this many processes with torchrun."""
        self.output_dir = Path(output_dir)
        self._log = self.output_dir.with_suffix(".log")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        launcher = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks > 1 else []
        # Use loopback: a bare machine may not resolve its own host name.
        environment = {**environment, "GLOO_SOCKET_IFNAME": "lo"} if ranks > 1 else environment
        words = [*words, f"output_dir={self.output_dir}"]
        self.begin = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "sa3dist.train", *words],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                # So that ``kill`` reaches loader processes and ranks.
                start_new_session=True,
            )

    def rows(self) -> list[dict]:
        """Rows of metrics.jsonl so far, without an incomplete last line."""
        path = self.output_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for_step(self, step: int, seconds: float) -> float:
        """Wait for a row of at least ``step``; seconds since the start of the command."""
        deadline = time.monotonic() + seconds
        while not any(row["step"] >= step for row in self.rows()):
            if self._process.poll() is not None:
                raise CommandFailed(f"ended with {self._process.returncode} before step {step}: {self.output()}")
            if time.monotonic() > deadline:
                self.kill()
                raise CommandFailed(f"not at step {step} after {seconds:.0f} s: {self.output()}")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - self.begin

    def finish(self, seconds: float, expected: int = 0) -> float:
        """Wait for the end; seconds since the start of the command. Raises CommandFailed for another exit code."""
        try:
            code = self._process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            self.kill()
            raise CommandFailed(f"not finished after {seconds:.0f} s: {self.output()}") from None
        if code != expected:
            raise CommandFailed(f"ended with {code}, expected {expected}: {self.output()}")
        return time.monotonic() - self.begin

    def kill(self) -> None:
        """SIGKILL the command and its process group."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM the command alone, as schedulers do."""
        self._process.terminate()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def output(self) -> str:
        """The end of its stdout and stderr."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-OUTPUT_CHARACTERS:]

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_) -> None:
        self.kill()


def largest_difference(rows: list[dict], others: list[dict]) -> float:
    """Largest relative difference of losses over the steps both runs have. Raises CommandFailed if there are none."""
    losses = {row["step"]: row["loss"] for row in others}
    shared = [row for row in rows if row["step"] in losses]
    if not shared:
        raise CommandFailed("the two runs have no step in common")
    return max(abs(row["loss"] - losses[row["step"]]) / abs(row["loss"]) for row in shared)
