"""Writes the tables of stored measurements, results/README.md, and the README's chart, results/speed.svg.

    python kernels/benchmarks/report.py

Reads the files in results/, where the last measurement of a case counts; measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# Files without a table.
OTHERS = """## Other files

* `gpu_run.json`: a run through the command line on one H100, killed and continued
* `gpu_tests.json`: the tests marked `gpu`, on an H200
* `gpu_formed_tiles.json`: FORM and FINISH of all layers of the medium model with other tiles (`bench_formed.py
  --sweep`)
* `gpu_attention.jsonl`: calls of attention, forward and backward, 2 x 24 heads of 64 (`bench_attention.py`). Its filled
  cases used flash attention, which training no longer does
* `gpu_padded_attention.jsonl`: the same for cuDNN with a padding mask, for cuDNN with the filling's keys as zeros, and
  for a pair as one call or two
* `gpu_ranks.json`: two processes on one card against one
* `small_adapters_cpu.json`: how much of small updates survives rounding (`bench_small_adapters.py`; see
  docs/gpu-step.md)

## Before

`before/` has measurements of the trainer on one H100 at commit bdca748, before weights were formed once per step:
`gpu_step_before.json` (a step at 30 s), `gpu_ops_before.json` (single layers: a launch takes 2 to 4 ms, the arithmetic
0.02 to 0.2), and `gpu_prototype.jsonl` (the frozen model and a prototype that forms weights, at 30 and 380 s).
`sa3dist plan` does not read them.
"""


def read(directory: Path, prefix: str) -> list[dict]:
    """Rows of all results files whose names start with ``prefix``, each with its file's options and environment.

    For bench_adapted_linear.py one row per adapter type: its layers together.
    """
    rows = []
    for path in sorted(directory.glob(f"{prefix}*.json*")):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows += [{"file": path.name, **json.loads(line)} for line in text.splitlines()]
            continue
        content = json.loads(text)
        # The environment's device name replaces that of the options ("cuda").
        shared = {"file": path.name, **content.get("options", {}), **content.get("environment", {})}
        if isinstance(content.get("summary"), dict) and prefix == "layers":
            rows += [{**shared, "adapter_type": name, **row} for name, row in content["summary"].items()]
        else:
            rows += [{**shared, **row} for row in content["rows"]]
    return rows


def newest(rows: Iterable[dict], keys: tuple[str, ...]) -> list[dict]:
    """The last measurement of each case."""
    return list({tuple(str(row.get(key)) for key in keys): row for row in rows}.values())


def where(row: dict) -> str:
    return f"{row['device']}, {row['threads']} threads" if "x86" in row["device"] else row["device"]


def adapter(row: dict) -> str:
    return f"{row['adapter_type']} r{row['rank']}"


def ways(row: dict) -> str:
    return ", ".join(way for way in ("compiled", "graphed") if row.get(way)) or "-"


def figure(key: str, form: str, unit: str = "") -> Callable[[dict], str]:
    """A function that formats a row's number, "-" if it has none."""
    return lambda row: "-" if row.get(key) is None else f"{row[key]:{form}}{unit}"


def megabytes(*values: float | None) -> str:
    return " / ".join("-" if value is None else f"{value / 1e6:.0f}" for value in values)


def emulated(row: dict) -> bool:
    """Whether the frozen side, without adapters, was slowed by emulated products."""
    return bool(row.get("emulated_products"))


# Title, prefix of the files, keys of a case, columns.
TABLES: tuple[tuple[str, str, tuple[str, ...], dict[str, Callable[[dict], str]]], ...] = (
    (
        "Whole training step (bench_step.py)",
        "step",
        ("device", "shape", "depth", "precision", "frames", "adapter_type", "rank", "compiled"),
        {
            "device": where,
            "model x blocks": lambda row: f"{row['shape']} x {row['depth']}",
            "precision": lambda row: row["precision"] + (" (emulated)" if emulated(row) else ""),
            "frames": figure("frames", ""),
            "adapter": adapter,
            "ours is": ways,
            "step": figure("ours_ms", ".0f", " ms"),
            "baseline / ours": figure("ratio", ".2f", "x"),
            "the same with encoding in every step": figure("ratio_from_audio", ".2f", "x"),
            "ours / frozen": lambda row: "-" if emulated(row) else f"{row['over_frozen']:.2f}",
            "step MB, ours / baseline": lambda row: megabytes(row["ours_step_bytes"], row["baseline_step_bytes"]),
        },
    ),
    (
        "Adapted layers (bench_adapted_linear.py)",
        "layers",
        ("device", "dtype", "shape", "tokens", "adapter_type", "rank"),
        {
            "device": where,
            "precision": lambda row: row["dtype"],
            "layers of one block": lambda row: f"{row['shape']}, {row['tokens']} tokens",
            "adapter": adapter,
            "ours": figure("milliseconds", ".1f", " ms"),
            "ours / frozen": figure("over_frozen", ".2f"),
            "materialised / ours": figure("materialised_over_factored", ".2f", "x"),
            "materialised, compiled / ours": figure("compiled_over_factored", ".2f", "x"),
            "MB of the largest layer, ours / frozen / materialised": lambda row: megabytes(
                *(row["layer_peak_bytes"][form] for form in ("factored", "frozen", "materialised"))
            ),
        },
    ),
    (
        "Kernels of a step, counted without a device (count_launches.py)",
        "launches",
        ("adapter_type", "frames", "depth"),
        {
            "adapter": lambda row: row["adapter_type"],
            "blocks, frames": lambda row: f"{row['depth']}, {row['frames']}",
            "of a block, forward + backward": lambda row: f"{row['block_forward']:g} + {row['block_backward']:g}",
            "once per step": figure("once_per_step", ""),
            "all": figure("total", ""),
            "at most": figure("most", ""),
        },
    ),
    (
        "Clips of unequal length (bench_packing.py)",
        "packing",
        ("device", "shape", "depth", "precision", "lengths"),
        {
            "device": where,
            "model x blocks": lambda row: f"{row['shape']} x {row['depth']}",
            "precision": lambda row: row["precision"],
            "frames of the clips": lambda row: ", ".join(map(str, row["lengths"])),
            "fill": figure("fill", ".0%"),
            "packed": figure("packed_ms", ".0f", " ms"),
            "padded / packed": figure("ratio", ".2f", "x"),
            "unmasked padded / packed": figure("ratio_to_full", ".2f", "x"),
        },
    ),
    (
        "Adapted layers against PEFT (bench_peft.py)",
        "peft",
        ("device", "dtype", "adapter_type", "rank", "tokens", "layer"),
        {
            "device": where,
            "precision": lambda row: row["dtype"],
            "adapter": lambda row: f"{adapter(row)}, {row['tokens']} tokens",
            "layer": lambda row: f"{row['layer']} {row['fan_in']} to {row['fan_out']}",
            "ours": lambda row: f"{row['ours_ms']['median']:.2f} ms",
            "PEFT / ours": lambda row: f"{row['peft_ms']['median'] / row['ours_ms']['median']:.2f}x",
        },
    ),
)
GPU_COLUMNS = {
    "file": lambda row: row["file"],
    "device": lambda row: row["device"],
    "model": lambda row: f"{row['shape']}, {row['frames']} frames",
    "adapter": adapter,
    "ours is": ways,
    "step": figure("ours_ms", ".1f", " ms"),
    "ours / frozen": figure("over_frozen", ".2f"),
    "baseline / ours": figure("ratio", ".2f"),
    "unequal / equal": figure("unequal_over_equal", ".2f"),
    "MB, all / recomputing": lambda row: megabytes(row.get("total_bytes"), row.get("recomputing_total_bytes")),
}


# The chart: width of the widest bar, height of a bar with its gap, space for names and for figures.
BAR_WIDTH, BAR_HEIGHT, NAMES, FIGURES = 420, 26, 190, 80


def speed_picture(directory: Path) -> str | None:
    """A chart of a dora-rows step and the reference's, in milliseconds, as SVG; None if either is missing."""
    before = {row["frames"]: row for row in read(directory / "before", "gpu_reference")}
    now = {
        row["frames"]: row
        for row in read(directory, "gpu_step")
        if (row["shape"], row["adapter_type"], row["rank"]) == ("medium-base", "dora-rows", 16)
    }
    bars: list[tuple[str, float | None, str]] = []
    for frames in sorted(before.keys() & now.keys()):
        bars.append((f"{frames * 4096 / 44100:.0f} s of audio", None, ""))
        bars.append(("the reference", before[frames]["reference_ms"], "#8a8f98"))
        bars.append(("ours", now[frames]["ours_ms"], "#2f6fde"))
        bars.append(("frozen model", now[frames]["frozen_ms"], "#c3c8d0"))
    if not bars:
        return None
    longest = max(value for _, value, _ in bars if value is not None)
    width, height = NAMES + BAR_WIDTH + FIGURES, BAR_HEIGHT * (len(bars) + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="18">Milliseconds of a training step, {now[frames]["device"]}: shorter is better</text>',
    ]
    for place, (name, value, colour) in enumerate(bars, start=1):
        top = place * BAR_HEIGHT
        if value is None:
            lines.append(f'<text x="8" y="{top + 18}" font-weight="bold">{name}</text>')
            continue
        long = BAR_WIDTH * value / longest
        lines.append(f'<text x="{NAMES - 8}" y="{top + 17}" text-anchor="end">{name}</text>')
        lines.append(f'<rect x="{NAMES}" y="{top + 3}" width="{long:.1f}" height="{BAR_HEIGHT - 6}" fill="{colour}"/>')
        lines.append(f'<text x="{NAMES + long + 6:.1f}" y="{top + 17}">{value:.0f}</text>')
    return "\n".join([*lines, "</svg>", ""])


def markdown(title: str, columns: dict[str, Callable[[dict], str]], rows: list[dict]) -> str:
    lines = [list(columns), ["---"] * len(columns), *([column(row) for column in columns.values()] for row in rows)]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    directory = parser.parse_args(arguments).results
    text = ["# Measurements", "", "Made by `python kernels/benchmarks/report.py` from the files in this folder.", ""]
    for title, prefix, case, columns in TABLES:
        if rows := newest(read(directory, prefix), case):
            text.append(markdown(title, columns, rows))
    # Measurements before and after weights were formed once per step, in one table.
    if gpu := [*read(directory / "before", "gpu_step"), *read(directory, "gpu_step")]:
        text.append(markdown("Whole training step on a GPU (gpu_check.py step)", GPU_COLUMNS, gpu))
    text += [OTHERS] if (directory / "before").is_dir() else []
    (directory / "README.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    if picture := speed_picture(directory):
        (directory / "speed.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
