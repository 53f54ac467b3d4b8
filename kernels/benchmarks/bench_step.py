"""One training step, ours against the reference's method, in the same process with the same weights and loss.

The baseline computes every adapted weight by a parametrisation that autograd differentiates, and recomputes all blocks.
Both sides use the same network code, autocast and AdamW settings. A third side is the frozen model, forward and
backward to its inputs: the cost of a step if adapters were free. Runs are interleaved and medians compared. With
--from-audio a fourth side encodes the clip's audio and caption, which the reference does before every step and we do
once; ``ratio_from_audio`` adds it to the baseline.

    python kernels/benchmarks/bench_step.py --shape small-music-base --depth 4 --frames 128 --adapter-type dora-rows
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from encoding_side import Encoding
from results_file import append_row, environment
from sa3dist_kernels import ADAPTER_TYPES
from sa3dist_kernels.frozen_products import product_dtype
from step_sides import DTYPES, MAKERS, SHAPES, Side
from timing import interleaved, peak_bytes, summary

# The sides compute the same loss in another order and, in bf16, with other roundings. In bf16 gradients of both sides
# are this far from float64, so only gross disagreement shows.
LOSS_TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}
GRADIENT_TOLERANCE = {"bf16": 0.3, "fp32": 1e-3}


def make_sides(options, device: torch.device) -> dict[str, Side]:
    return {name: Side(name, options, device) for name in MAKERS}


def gradient_distance(ours: dict[str, torch.Tensor], baseline: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance over all trained tensors. Raises KeyError if the sides train different ones."""
    squares = [((ours[name] - value).square().sum(), value.square().sum()) for name, value in baseline.items()]
    difference, total = (torch.stack(column).sum().item() for column in zip(*squares, strict=True))
    return (difference / total) ** 0.5


def cpu_step_bytes(side: Side) -> int:
    """Peak bytes of a process's first two steps beyond the loaded side, including AdamW's moments.

    They must be the process's first steps: freed pages stay resident and would hide a later peak.
    """
    # Reset the peak, which loading may have set higher than a step does (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    resident = psutil.Process().memory_info().rss
    for _ in range(2):
        side.step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - resident


def memory_in_child(options, side: str) -> int:
    """``cpu_step_bytes`` in a fresh process, without freed pages of other sides."""
    values = {"--memory-of": side, "--device": "cpu", "--depth": options.depth or 0}
    for name in ("shape", "frames", "batch", "adapter_type", "rank", "precision", "compile"):
        values[f"--{name.replace('_', '-')}"] = getattr(options, name)
    words = [str(word) for pair in values.items() for word in pair]
    done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def step_bytes(options, sides: dict[str, Side], device: torch.device) -> dict[str, int | None]:
    """Peak bytes of a step beyond what is allocated between steps (on a CPU: ``cpu_step_bytes``)."""
    if device.type == "cuda":
        return {name: peak_bytes(side.step, device) for name, side in sides.items()}
    if options.skip_memory:
        return dict.fromkeys(sides)
    return {name: memory_in_child(options, name) for name in sides}


def compare(options, sides: dict[str, Side], device: torch.device) -> dict:
    """Medians, ratios, losses and peak memory of the sides at ``options.frames`` and ``options.batch``."""
    for side in sides.values():
        side.use(options.batch, options.frames)
    losses = {name: side.step().item() for name, side in sides.items()}
    distance = gradient_distance(sides["ours"].gradients(), sides["baseline"].gradients())
    # Before graph capture: a graph keeps its memory between steps.
    memory = step_bytes(options, sides, device)
    for side in sides.values():
        side.record()
    if sides["ours"].replay:
        losses["ours"] = sides["ours"].step().item()
        distance = max(distance, gradient_distance(sides["ours"].gradients(), sides["baseline"].gradients()))
    steps = {name: side.step for name, side in sides.items()}
    if options.from_audio:
        steps["encoding"] = Encoding(sides["baseline"].base, options.frames, options.batch).step
    times = interleaved(steps, options.repeats, device, warm_up=1)
    spans = {name: summary(values) for name, values in times.items()}
    ours, baseline, frozen = (spans[name]["median"] for name in ("ours", "baseline", "frozen"))
    encoding = spans["encoding"]["median"] if options.from_audio else 0.0
    loss_error = abs(losses["ours"] - losses["baseline"]) / abs(losses["baseline"])
    return {
        "shape": options.shape,
        "depth": len(sides["ours"].base.dit.transformer.layers),
        "frames": options.frames,
        "batch": options.batch,
        "adapter_type": options.adapter_type,
        "rank": options.rank,
        "precision": options.precision,
        "repeats": options.repeats,
        "emulated_products": emulated(options, device),
        "compiled": sides["ours"].compiled,
        "graphed": sides["ours"].replay is not None,
        "ours_ms": round(ours, 3),
        "baseline_ms": round(baseline, 3),
        "frozen_ms": round(frozen, 3),
        "encoding_ms": round(encoding, 3) if options.from_audio else None,
        "spread_ms": {name: [round(span["min"], 3), round(span["max"], 3)] for name, span in spans.items()},
        "ratio": round(baseline / ours, 3),
        "ratio_from_audio": round((baseline + encoding) / ours, 3) if options.from_audio else None,
        "over_frozen": round(ours / frozen, 3),
        **{f"{name}_step_bytes": value for name, value in memory.items()},
        "ours_loss": losses["ours"],
        "baseline_loss": losses["baseline"],
        "gradient_distance": distance,
        "losses_agree": loss_error <= LOSS_TOLERANCE[options.precision],
        "gradients_agree": distance <= GRADIENT_TOLERANCE[options.precision],
    }


def emulated(options, device: torch.device) -> bool:
    """Whether this machine emulates the baseline's products, which slows them."""
    dtype = DTYPES[options.precision]
    return product_dtype(dtype, device) != dtype


def line(row: dict) -> str:
    """One measurement as a line of text."""
    memory = " / ".join(
        "-" if row[f"{name}_step_bytes"] is None else f"{row[f'{name}_step_bytes'] / 1e6:.0f}" for name in MAKERS
    )
    encoding = f", {row['ratio_from_audio']:.2f}x from audio" if row["ratio_from_audio"] else ""
    agree = "agree" if row["losses_agree"] and row["gradients_agree"] else "DIFFER"
    return (
        f"{row['shape']} {row['frames']:5} frames {row['adapter_type']:13} r{row['rank']:<4}"
        f"ours {row['ours_ms']:9.1f} ms  baseline {row['baseline_ms']:9.1f} ms ({row['ratio']:.2f}x{encoding})  "
        f"frozen {row['frozen_ms']:9.1f} ms ({row['over_frozen']:.2f}x)  "
        f"step MB {memory}  "
        f"losses {row['ours_loss']:.5f} / {row['baseline_loss']:.5f}, gradients {row['gradient_distance']:.1e} {agree}"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small-music-base")
    parser.add_argument("--depth", type=int, default=4, help="transformer blocks; 0 = the released number")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--adapter-type", choices=[*ADAPTER_TYPES, "all"], default="dora-rows", metavar="TYPE")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="base and autocast; fp32: no autocast")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="as the setting, in a long run"
    )
    parser.add_argument(
        "--cuda-graphs", choices=("auto", "on", "off"), default="auto", help="as the setting, in a long run"
    )
    parser.add_argument("--from-audio", action="store_true", help="time what the reference encodes in every step too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-memory", action="store_true", help="on a CPU: leave out the fresh process per side")
    parser.add_argument("--json", type=Path, help="append one JSON object per measurement")
    parser.add_argument("--memory-of", choices=list(MAKERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.depth = options.depth or None
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if options.memory_of:
        side = Side(options.memory_of, options, device)
        side.use(options.batch, options.frames)
        print(cpu_step_bytes(side))
        return 0
    machine = environment(device)
    print(json.dumps(machine), flush=True)
    if emulated(options, device):
        print(
            "this CPU emulates bf16 matrix products: the baseline's plain layers pay for that (minutes per step), ours "
            "multiply in float32; --precision fp32 compares the two ways of training alone",
            file=sys.stderr,
        )
    agree = True
    for kind in list(ADAPTER_TYPES) if options.adapter_type == "all" else [options.adapter_type]:
        options.adapter_type = kind
        row = compare(options, make_sides(options, device), device)
        agree = agree and row["losses_agree"] and row["gradients_agree"]
        print(line(row), flush=True)
        append_row(options.json, {**machine, **row})
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
