"""How far real steps are from the counted roofline: the factor, from stored benchmark results.

A result is a step that was timed (bench_step.py appends them as JSON lines, gpu_check.py writes a file with rows). Its
factor is its time over the roofline time of what it computed, with its device's ceilings.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sa3dist_kernels import ADAPTER_TYPES

from sa3dist.adapters import candidate_layers
from sa3dist.cost_model.devices import Device, datasheet_of
from sa3dist.cost_model.flops import Adapter, MicroBatch, count
from sa3dist.errors import counted
from sa3dist.model.config import ModelConfig
from sa3dist.model.loading import meta_roots
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.released import RELEASED, released_config

# Of a device no step was ever timed on: reaching half of the roofline is what unfused training steps commonly do.
ASSUMED_FACTOR = 2.0
# In a checkout; an installed package comes without measurements.
RESULTS = Path(__file__).parents[2] / "kernels/benchmarks/results"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One timed step: what it computed, on which device, and its factor over that device's roofline."""

    shape: str
    adapter_type: str
    value_bytes: int
    tokens: int
    device: str
    factor: float
    file: str


@dataclasses.dataclass(frozen=True)
class Factor:
    """A calibration: the factor, what it rests on in words, and how far single measurements are from it.

    spread   (lowest, highest) of the measurements it was made from, over it; None without any
    own      whether they were made on that very device: what its host costs is then within the factor
    """

    value: float
    evidence: str
    spread: tuple[float, float] | None = None
    own: bool = False


@functools.cache
def _released(shape: str, depth: int) -> tuple[ModelConfig, frozenset[str]]:
    """A released model's config at some depth, and the names of all its layers."""
    config = parse_model_config(released_config(shape, depth), shape)
    return config, frozenset(candidate_layers(meta_roots(config)))


def read_results(folder: Path, here: Device | None) -> list[Measured]:
    """Every timed step of our side in a folder; those on CPUs are taken to be of this machine's kind.

    here   this machine's measured ceilings, for results of the same GPU or of CPUs, whose ceilings are in no table;
           None leaves CPUs out
    """
    found = []
    for path in sorted(Path(folder).glob("*.json*")):
        for row in _rows(path):
            if row.get("emulated_products") or "ours_ms" not in row or row.get("shape") not in RELEASED:
                continue
            device = _device_of(row, here)
            if device is not None:
                found.append(_measured(row, device, path.name))
    return found


def _device_of(row: dict[str, Any], here: Device | None) -> Device | None:
    """Whose ceilings a result is held against: this machine's where it is the same device, else the table's."""
    on_gpu = bool(row.get("device_memory_bytes"))
    listed = datasheet_of(row["device"]) if on_gpu else None
    if here is not None and here.on_gpu == on_gpu and (not on_gpu or listed is datasheet_of(here.name)):
        return here
    return listed


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
        return
    content = json.loads(text)
    if isinstance(content, dict) and isinstance(content.get("rows"), list):
        yield from ({**content.get("environment", {}), **row} for row in content["rows"])


def _measured(row: dict[str, Any], device: Device, file: str) -> Measured:
    config, layers = _released(row["shape"], row["depth"])
    context = config.prompt.max_length + 1
    batch = MicroBatch((row["frames"],) * row["batch"], context, context)
    size = 2 if row["precision"] == "bf16" else 4
    adapter = Adapter(ADAPTER_TYPES[row["adapter_type"]], row["rank"], layers)
    counted = count(config, batch, adapter, size, size)
    roofline = sum(counted.total().seconds(device.flops_per_second(size), device.bytes_per_second))
    tokens = row["batch"] * (row["frames"] + config.dit.num_memory_tokens)
    where = device.name if device.on_gpu else f"a CPU ({row['cpu_capability']})"
    return Measured(row["shape"], row["adapter_type"], size, tokens, where, row["ours_ms"] / 1e3 / roofline, file)


def calibrate(
    measured: list[Measured], device: Device, shape: str, adapter_type: str, value_bytes: int, tokens: int
) -> Factor:
    """The factor for a job: of the nearest measurements on that device, else on other GPUs, else assumed."""
    own = [one for one in measured if (one.device == device.name) or (not device.on_gpu and "CPU" in one.device)]
    others = [one for one in measured if "CPU" not in one.device] if device.on_gpu else []
    if not (own or others):
        return Factor(ASSUMED_FACTOR, f"datasheet only: a factor of {ASSUMED_FACTOR:g} over the roofline is assumed")
    used = own or others

    def weight(one: Measured) -> float:
        far = abs(math.log(one.tokens / tokens)) + 0.5 * (one.shape != shape) + 0.5 * (one.value_bytes != value_bytes)
        return (0.1 + far + 0.3 * (one.adapter_type != adapter_type)) ** -2

    total = sum(map(weight, used))
    value = math.exp(sum(weight(one) * math.log(one.factor) for one in used) / total)
    where = sorted({one.device for one in used})
    files = ", ".join(sorted({one.file for one in used}))
    carried = "" if own else ", carried over from another device"
    evidence = f"calibrated by {counted(len(used), 'step')} timed on {', '.join(where)} ({files}){carried}"
    factors = [one.factor for one in used]
    return Factor(value, evidence, (min(factors) / value, max(factors) / value), own=bool(own))
