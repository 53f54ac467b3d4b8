"""A benchmark's results as a JSON file, rewritten after each row; a time budget; and a description of the machine."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


class ResultsFile:
    """A JSON object that is written to disk after every change, so that a killed run keeps its measurements.

    content   "state" (running, finished or failed), "environment", "options", "rows" and what ``set`` adds
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = Path(path)
        self.content = content

    @classmethod
    def start(cls, path: Path, device: torch.device, options: dict[str, Any]) -> ResultsFile:
        file = cls(path, {"state": "running", "environment": environment(device), "options": options, "rows": []})
        file.write()
        return file

    @classmethod
    def reopen(cls, path: Path) -> ResultsFile:
        return cls(path, json.loads(Path(path).read_text(encoding="utf-8")))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.write()

    def set(self, **values: Any) -> None:
        self.content.update(values)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.content, indent=1) + "\n")
        Path(temporary).chmod(0o644)
        os.replace(temporary, self.path)


def tell_choices() -> None:
    """Show what the program's own log says: a way that is slower than a run's must not be timed unseen."""
    logging.basicConfig(format="%(name)s: %(message)s")
    for package in ("sa3dist", "sa3dist_kernels"):
        logging.getLogger(package).setLevel(logging.INFO)


class Budget:
    """A time limit for a part. Measurements that do not fit are skipped and listed, not cut off."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        return self.left() > seconds


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and command of a measurement. Works without git and triton."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "device": properties.name if cuda else platform.processor() or platform.machine(),
        "device_memory_bytes": properties.total_memory if cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16_matmul_on_cpu": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version_of(name) for name in ("triton", "transformers", "accelerate", "nvidia-cudnn-frontend")},
        "python": platform.python_version(),
        "commit": commit(),
        "source_sha256": source_digest(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
    }


def write_result(options: argparse.Namespace, device: torch.device, **content: Any) -> dict[str, Any]:
    """``content`` with environment and options; written to ``options.out`` if set, and returned."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    result = {"environment": environment(device), "options": values, **content}
    if options.out:
        ResultsFile(options.out, result).write()
    return result


def append_row(path: Path | None, row: dict[str, Any]) -> None:
    """Append a line to a JSON lines file, if ``path`` is set."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` if files differ from it; None without git or its history."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def source_digest() -> str:
    """SHA-256 over the Python sources of both packages: identifies the code without git."""
    state = hashlib.sha256()
    for folder in ("sa3dist", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            state.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return state.hexdigest()
