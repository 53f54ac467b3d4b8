"""An endpoint's queue as users run it: small jobs, schedulers as processes, and what runs of their jobs."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from sa3dist.serve.job_store import JobStore
from sa3dist.serve.processes import MARK, Mark
from tests.helpers.program import ENVIRONMENT

APP = "fal-ai/stable-audio-3-trainer"
# Small, exact, saved at every step, and seen at every step.
SETTINGS = {
    "mixed_precision": "no",
    "deterministic": True,
    "num_workers": 0,
    "save_every": 1,
    "log_every": 1,
    "report": False,
    "gradient_checkpointing": "off",
    "learning_rate": 3e-3,
}


def request(clips: Path, steps: int, **more) -> dict:
    """What a client sends."""
    words = {"audio_data_url": str(clips), "model": "medium-base", "number_of_steps": steps, "rank": 4, "duration": 2}
    return {**words, "base_precision": "fp32", **more}


class Host:
    """One scheduler with its own locks: to the others it is on another machine."""

    def __init__(self, name: str, store: JobStore, data: Path, base: Path, **options) -> None:
        self.name, self.locks = name, str(data / f"locks-{name}")
        self._log = data / f"scheduler-{name}.log"
        values = {"models": {"medium-base": str(base)}, "host": name, "locks": self.locks, "lease_seconds": 6}
        words = ["--database", store.url, "--data", str(data), "--options", json.dumps(values | options)]
        self._command = [sys.executable, "-m", "sa3dist.serve.scheduler", *words]
        self.scheduler: subprocess.Popen | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.scheduler = subprocess.Popen(
                self._command, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stderr=log
            )

    def stop(self) -> None:
        """As an operator would: jobs go on."""
        self.scheduler.terminate()
        self.scheduler.wait()

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those of this host's jobs: kind is runner or trainer."""
        module = {"runner": "sa3dist.serve.runner", "trainer": "sa3dist.train"}[kind]
        found = []
        for process, mark in marks():
            try:
                if mark.locks == self.locks and module in process.cmdline():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end_all(self) -> None:
        """Kill everything, and leave nothing."""
        if self.scheduler is not None:
            self.scheduler.kill()
            self.scheduler.wait()
        while left := [process for process, mark in marks() if mark.locks == self.locks]:
            for process in left:
                send(process, signal.SIGKILL)


def marks() -> list[tuple[psutil.Process, Mark]]:
    """All marked processes that live."""
    found = []
    for process in psutil.process_iter():
        try:
            text = process.environ().get(MARK)
        except (psutil.Error, OSError):
            continue
        if text and process.pid != os.getpid():
            found.append((process, Mark.of_json(json.loads(text))))
    return found


def send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return


def lora_digest(job) -> str:
    """Of the file that a finished job gives away."""
    return hashlib.sha256((job.folder / job.result["lora_file"]["path"]).read_bytes()).hexdigest()
