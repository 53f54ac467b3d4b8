"""Which configuration of a kernel a device runs fastest: measured once, kept on disk.

One JSON file per device and Triton version in the user's cache directory maps "op, format, sizes" to the fastest of an
op's few candidates. What is not there is measured at its first use, but not while a CUDA graph is captured: the first
candidate serves then. So it does, whatever is on disk, in the interpreter, and under
``torch.use_deterministic_algorithms``, where a measured choice would make two runs round differently.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "SA3DIST_TUNING"
# The median of few runs tells candidates apart that differ by more than their spread; the others may change places.
RUNS = 7


def folder() -> Path:
    """Where the files are: $SA3DIST_TUNING, else sa3dist/tuning in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(cache) / "sa3dist" / "tuning")


def bucket(tokens: int) -> int:
    """The power of two that stands for a number of tokens: batches of unequal length share one choice."""
    return triton.next_power_of_2(max(tokens, 16))


def chosen(op: str, sizes: tuple, like: torch.Tensor, candidates: Sequence[dict], run: Callable[[dict], None]) -> dict:
    """The fastest of ``candidates`` for ``op`` at ``sizes`` on the device and in the format of ``like``.

    run   runs the op once with a configuration; called for measuring only, any number of times
    """
    if not _may_choose(like):
        return candidates[0]
    key = ", ".join(map(str, (op, like.dtype, *sizes)))
    table = _table(_path(like.device))
    if table.get(key) not in candidates:
        if _recording():
            return candidates[0]
        table[key] = _fastest(key, candidates, run)
        _save(_path(like.device), key, table[key])
    return table[key]


def _may_choose(like: torch.Tensor) -> bool:
    return like.device.type == "cuda" and like.shape[0] > 0 and not torch.are_deterministic_algorithms_enabled()


def _recording() -> bool:
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _path(device: torch.device) -> Path:
    name = f"{torch.cuda.get_device_name(device)} triton {triton.__version__} torch {torch.__version__}"
    return folder() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"


@functools.cache
def _table(path: Path) -> dict[str, dict]:
    """The choices on disk; those of this process are added to it."""
    return _read(path)


def _read(path: Path) -> dict[str, dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError) as problem:
        log.warning("%s cannot be read (%s); measuring anew", path, problem)
        return {}


def _save(path: Path, key: str, config: dict) -> None:
    """Add one choice. Other processes add theirs: the file is read again, and replaced as a whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**_read(path), key: config}
        descriptor, temporary = tempfile.mkstemp(prefix=".tuning.", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError as problem:
        log.warning("%s cannot be written (%s); the next start measures again", path, problem)


def _fastest(key: str, candidates: Sequence[dict], run: Callable[[dict], None]) -> dict:
    times = [_milliseconds(functools.partial(run, candidate)) for candidate in candidates]
    best = times.index(min(times))
    if times[best] == float("inf"):
        raise RuntimeError(f"{key}: none of {len(candidates)} configurations runs on this device")
    log.info("%s: %s of %s ms", key, candidates[best], ", ".join(f"{spent:.3f}" for spent in times))
    return candidates[best]


def _milliseconds(run: Callable[[], None]) -> float:
    """Median time of one run after one that compiles; infinite where the device lacks the resources."""
    try:
        run()
    except triton.OutOfResources as problem:
        log.info("left out: %s", problem)
        return float("inf")
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
