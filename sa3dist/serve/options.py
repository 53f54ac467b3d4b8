"""How an endpoint runs its jobs: options that a scheduler passes to each runner."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a server's jobs. Only plain values, because they are passed as JSON.

    executor          local, slurm or kubernetes
    devices           numbers of this host's GPUs; or of job slots if it has none or a cluster runs the jobs
    gpus              whether ``devices`` are GPUs
    devices_per_job   GPUs, and processes, of a job per node
    nodes             of a job; chosen by a cluster's scheduler
    limit             maximum of running jobs on all hosts together; None: limited by devices only
    models            released name in a request -> directory
    settings          defaults for the trainer's settings
    work_dir          shared data that depends only on the base; also shards and latents of jobs without a work_dir
    locks             folder for locks, on this host's disk
    host              this host's name
    lease_seconds     length of a lease; a job whose lease is not renewed is taken over
    poll_seconds      interval between checks for new jobs
    stop_seconds      time between asking a trainer to stop and killing it
    stall_seconds     time without progress after which a training is killed
    preparation_stall_seconds   the same before training begins
    options           arguments for sbatch, or options of kubernetes_executor.py
    """

    executor: str
    devices: tuple[int, ...]
    work_dir: str
    locks: str
    host: str
    gpus: bool = False
    devices_per_job: int = 1
    nodes: int = 1
    limit: int | None = None
    models: dict[str, str] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    lease_seconds: float = 30.0
    poll_seconds: float = 0.5
    stop_seconds: float = 30.0
    stall_seconds: float = 1200.0
    preparation_stall_seconds: float = 4200.0
    options: tuple[str, ...] = ()

    @property
    def renew_seconds(self) -> float:
        return self.lease_seconds / 5

    @property
    def margin_seconds(self) -> float:
        """Time before the lease's end in the database by which all work here must have ended."""
        return max(1.0, self.lease_seconds / 10)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> RunOptions:
        lists = {name: tuple(values[name]) for name in ("devices", "options")}
        return cls(**values | lists)


def gpus_here() -> tuple[int, ...]:
    """Numbers of the GPUs that this process may use; empty without a driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and all(word.strip().isdecimal() for word in chosen.split(",")):
        return tuple(int(word) for word in chosen.split(","))
    if chosen == "" or shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return tuple(range(listed.stdout.count("\n"))) if listed.returncode == 0 else ()


def shared_work_dir(data: Path) -> str:
    """The shared work directory of the endpoint whose files are in ``data``."""
    return str(data.absolute() / "work")
