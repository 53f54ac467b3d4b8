"""How far real steps are from the counted roofline: the factor, from a step that was timed on the same GPU.

gpu_check.py writes timed steps as rows of a JSON file. The factor is a row's time over the roofline time of what it
computed, with its device's ceilings.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sa3dist_kernels import ADAPTER_TYPES

from sa3dist.adapters import candidate_layers
from sa3dist.cost_model.devices import Device, datasheet_of
from sa3dist.cost_model.fake_network import AdapterShape, BatchShape, FakeNetwork, Numerics
from sa3dist.model.loading import meta_roots
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.released import RELEASED, released_config

# Of a device no step was timed on. An H100 takes 2.5 times the roofline of its datasheet at 380 s (5.9 at 30 s); two
# AVX2 cores take 1.3 times their measured one.
ASSUMED_FACTOR = {"GPU": 2.5, "CPU": 1.3}
# In a checkout; an installed package comes without measurements.
RESULTS = Path(__file__).parents[2] / "kernels/benchmarks/results"


@dataclasses.dataclass(frozen=True)
class Factor:
    """A step's time over its roofline, and what that rests on in words.

    measured   on that very device: what its host costs is then within the factor
    """

    value: float
    evidence: str
    measured: bool = False


def calibrate(folder: Path, device: Device, tokens: int, adapter_type: str) -> Factor:
    """The factor of the step timed on that GPU that is nearest in length, of that adapter type if one is; else assumed.

    folder   of results
    """
    rows = [
        (row, path.name)
        for path in sorted(Path(folder).glob("*.json"))
        for row in _rows(path)
        if row.get("shape") in RELEASED and "ours_ms" in row and _is_of(row, device)
    ]
    if not rows:
        kind = "GPU" if device.on_gpu else "CPU"
        factor = ASSUMED_FACTOR[kind]
        return Factor(factor, f"datasheet only: a factor of {factor:g} over the roofline is assumed for a {kind}")

    def distance(entry: tuple[dict[str, Any], str]) -> tuple[float, bool]:
        row, _ = entry
        return abs(math.log(row["batch"] * row["frames"] / tokens)), row["adapter_type"] != adapter_type

    row, file = min(rows, key=distance)
    what = f"{row['shape']}, {row['batch']} x {row['frames']} frames, {row['adapter_type']}"
    evidence = f"a step timed on this GPU ({file}: {what}, {row['ours_ms']:.3g} ms)"
    return Factor(row["ours_ms"] / 1e3 / _roofline(row, device), evidence, measured=True)


def _is_of(row: dict[str, Any], device: Device) -> bool:
    known = datasheet_of(row["device"]) if row.get("device_memory_bytes") else None
    return known is not None and known is (datasheet_of(device.name) if device.on_gpu else None)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and isinstance(content.get("rows"), list):
        yield from ({**content.get("environment", {}), **row} for row in content["rows"])


def _roofline(row: dict[str, Any], device: Device) -> float:
    """Seconds."""
    config = parse_model_config(released_config(row["shape"], row["depth"]), row["shape"])
    layers = frozenset(candidate_layers(meta_roots(config)))
    adapter = AdapterShape(ADAPTER_TYPES[row["adapter_type"]], row["rank"], layers, device.runs_kernels)
    bf16 = row["precision"] == "bf16"
    network = FakeNetwork(config, adapter, Numerics(torch.bfloat16 if bf16 else torch.float32, autocast=bf16))
    work = network.count(BatchShape(row["batch"], row["frames"])).total()
    return sum(work.seconds(device.flops_per_second(2 if bf16 else 4), device.bytes_per_second))
