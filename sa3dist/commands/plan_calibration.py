"""Calibrate predicted step times: the factor between real steps and the roofline, from steps timed on the same GPU.

gpu_check.py writes timed steps as rows of a JSON file. The model: a step takes a fixed time plus a factor times its
roofline, which is the least time for its products, attention and forming of adapted weights at the device's peak rates.
Timings at two lengths with the nearest adapter type determine both.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sa3dist_kernels import ADAPTER_TYPES, AdapterType

from sa3dist.adapters import candidate_layers
from sa3dist.cost_model.devices import Device, datasheet_of
from sa3dist.cost_model.fake_network import AdapterShape, BatchShape, FakeNetwork, Numerics
from sa3dist.errors import ConfigError
from sa3dist.model.loading import meta_roots
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.released import RELEASED, released_config

# Factors for devices without timed steps. An H100 takes 2.3 times the roofline of its datasheet, plus 6 ms; two AVX2
# cores take 1.3 times their measured roofline.
ASSUMED_FACTOR = {"GPU": 2.5, "CPU": 1.3}
# Exists in a checkout; an installed package has no measurements.
RESULTS = Path(__file__).parents[2] / "kernels/benchmarks/results"


@dataclasses.dataclass(frozen=True)
class Factor:
    """Ratio of a step's time to its roofline.

    evidence        a description of the measurements it is based on
    fixed_seconds   additional time per micro batch, independent of its length
    measured        whether it was measured on this device; then it includes the host's time
    """

    value: float
    evidence: str
    fixed_seconds: float = 0.0
    measured: bool = False


def forming_passes(kind: AdapterType, forms: int = 1) -> int:
    """Number of passes over all adapted weights of ``forms`` times FORM and one FINISH.

    FORM reads W0 and writes W'; row norms need another pass, column norms one more. FINISH reads W0 once for every norm
    that is differentiated. Source: spec/formed.md.
    """
    finish = (kind.rows and kind.cols) if kind.xs else kind.rows + kind.cols
    return forms * (2 + kind.rows + kind.cols) + finish


def calibrate(folder: Path, device: Device, tokens: int, adapter_type: str) -> Factor:
    """The factor from steps timed on this GPU with the nearest adapter type and lengths; assumed if there are none.

    folder   of results
    Raises ConfigError, naming the file, if one is not JSON.
    """
    rows = [
        {**row, "file": path.name, "tokens": row["batch"] * row["frames"]}
        for path in sorted(Path(folder).glob("*.json"))
        for row in _rows(path)
        if row.get("shape") in RELEASED and "ours_ms" in row and _is_of(row, device)
    ]
    if not rows:
        kind = "GPU" if device.on_gpu else "CPU"
        factor = ASSUMED_FACTOR[kind]
        return Factor(factor, f"datasheet only: a factor of {factor:g} over the roofline is assumed for a {kind}")
    kind = ADAPTER_TYPES[adapter_type]

    def unlike(row: dict[str, Any]) -> tuple[bool, ...]:
        other = ADAPTER_TYPES[row["adapter_type"]]
        return kind.xs != other.xs, kind.cols != other.cols, kind.rows != other.rows, kind.name != other.name

    def distance(row: dict[str, Any]) -> float:
        return abs(math.log(row["tokens"] / tokens))

    near = min(rows, key=lambda row: (unlike(row), distance(row)))
    what = f"{near['shape']}, {near['batch']} x {near['frames']} frames, {near['adapter_type']}"
    evidence = f"a step timed on this GPU ({near['file']}: {what}, {near['ours_ms']:.3g} ms)"
    same = [row for row in rows if all(row[key] == near[key] for key in ("file", "shape", "depth", "adapter_type"))]
    # Prefer a second timing on the other side of the requested length.
    others = sorted(same, key=lambda row: ((row["tokens"] < tokens) == (near["tokens"] < tokens), distance(row)))
    least, taken = _roofline(near, device), near["ours_ms"] / 1e3
    for other in others:
        if other["tokens"] != near["tokens"]:
            more_least, more_taken = _roofline(other, device) - least, other["ours_ms"] / 1e3 - taken
            value = more_taken / more_least
            if 0 <= value * least <= taken:
                evidence = evidence.replace(" ms)", f" ms, and at {other['frames']} frames {other['ours_ms']:.3g} ms)")
                return Factor(value, evidence, taken - value * least, measured=True)
    return Factor(taken / least, evidence, measured=True)


def _is_of(row: dict[str, Any], device: Device) -> bool:
    datasheet = datasheet_of(row["device"]) if row.get("device_memory_bytes") else None
    return datasheet is not None and datasheet is (datasheet_of(device.name) if device.on_gpu else None)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--results: {path} is not valid JSON ({error}); remove it from the folder") from error
    if isinstance(content, dict) and isinstance(content.get("rows"), list):
        yield from ({**content.get("environment", {}), **row} for row in content["rows"])


def _roofline(row: dict[str, Any], device: Device) -> float:
    """The roofline of a timed step, in seconds."""
    config = parse_model_config(released_config(row["shape"], row["depth"]), row["shape"])
    layers = candidate_layers(meta_roots(config))
    adapter = AdapterShape(ADAPTER_TYPES[row["adapter_type"]], row["rank"], frozenset(layers), device.runs_kernels)
    bf16 = row["precision"] == "bf16"
    network = FakeNetwork(config, adapter, Numerics(torch.bfloat16 if bf16 else torch.float32, autocast=bf16))
    work, value_bytes = network.count(BatchShape(row["batch"], row["frames"])).total(), 2 if bf16 else 4
    values = sum(layer.weight.numel() for layer in layers.values()) if device.runs_kernels else 0
    forming = forming_passes(adapter.kind) * values * value_bytes / device.bytes_per_second
    return sum(work.seconds(device.flops_per_second(value_bytes), device.bytes_per_second)) + forming
