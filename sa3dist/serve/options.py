"""How an endpoint runs its jobs: what a scheduler hands on to the shepherd of each."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sa3dist.serve.leases import LEASE_SECONDS


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """All plain values: they travel as JSON.

    executor          local, slurm or kubernetes
    devices           numbers of the GPUs of this host, or of its slots where it has none or a cluster has them
    gpus              whether ``devices`` are GPUs
    devices_per_job   GPUs, and with them processes, of a job on each of its nodes
    nodes             of a job; a cluster's scheduler finds them
    limit             most jobs at once on all hosts; None: as many as there are devices
    models            directories, by the released name that a request says
    settings          the trainer's defaults here, in the place of its own
    work_dir          what depends on the base alone; shards and latents of jobs that name no folder of their own
    locks             folder of the locks on this host's disk
    host              this host's name
    lease_seconds     after which a job that nobody renews is taken over
    poll_seconds      between two looks for work
    stop_seconds      between the request to save and end, and the kill
    stall_seconds     without a sign of progress while training; preparation_stall_seconds before that
    options           words for sbatch, or what kubernetes_executor.py knows
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
    lease_seconds: float = LEASE_SECONDS
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
        """How long before the lease's end, by the database, all work has ended here."""
        return max(1.0, self.lease_seconds / 10)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> RunOptions:
        lists = {name: tuple(values[name]) for name in ("devices", "options")}
        return cls(**values | lists)


def gpus_here() -> tuple[int, ...]:
    """Numbers of the GPUs that this process may use; none where there is no driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and all(word.strip().isdecimal() for word in chosen.split(",")):
        return tuple(int(word) for word in chosen.split(","))
    if chosen == "" or shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return tuple(range(listed.stdout.count("\n"))) if listed.returncode == 0 else ()


def shared_work_dir(data: Path) -> str:
    """Where jobs of the endpoint whose files are in ``data`` share shards and latents."""
    return str(data.absolute() / "work")
