"""Tables and pictures of the stored measurements: results/README.md and one PNG per kind of benchmark.

    python kernels/benchmarks/report.py        (pictures need matplotlib: pip install sa3dist[plots])

Reads what the benchmarks left in results/, newest measurement of each case last; computes nothing anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# What has no table of its own, in words.
OTHERS = """## Other files

`gpu_run.json` is as much of a run through the command line as the time on one H100 allowed: to its first step.
`gpu_formed_tiles.json` has FORM and FINISH of all layers of the medium model with other tiles (`bench_formed.py
--sweep`); `gpu_attention.jsonl` a call of attention, forward and backward, 24 heads of 64, of flash attention, of cuDNN
with a bias between a clip and its filling, and of cuDNN over all tokens (d64), in milliseconds.

## Before

`before/` is what one H100 showed of the trainer at commit bdca748, before adapted weights were formed once a step:
`gpu_step_before.json` (a step of 30 s), `gpu_ops_before.json` (single layers: launching one takes 2 to 4 ms, its
arithmetic 0.02 to 0.2), and `gpu_prototype.jsonl` (the frozen model, and a prototype that forms the weights, at 30 and
380 s). `sa3dist plan` does not read them.
"""
Table = tuple[str, list[str], list[list[str]]]


def read(directory: Path, prefix: str) -> list[dict]:
    """Rows of every results file whose name starts with ``prefix``; a file's environment goes into each of its rows."""
    rows = []
    for path in sorted(directory.glob(f"{prefix}*.json*")):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows += [{"file": path.name, **json.loads(line)} for line in text.splitlines()]
        else:
            content = json.loads(text)
            # Both name a device: the environment by its own name, the options as torch does.
            shared = {"file": path.name, **content.get("options", {}), **content.get("environment", {})}
            rows += [{**shared, **row} for row in content["rows"]]
    return rows


def read_blocks(directory: Path) -> list[dict]:
    """One row per adapter type of every results file of bench_adapted_linear.py: its layers together."""
    rows = []
    for path in sorted(directory.glob("layers*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        shared = {**content["options"], **content["environment"]}
        rows += [{**shared, "adapter_type": name, **figures} for name, figures in content["summary"].items()]
    return rows


def newest(rows: Iterable[dict], keys: tuple[str, ...]) -> list[dict]:
    """The last measurement of every case."""
    return list({tuple(str(row.get(key)) for key in keys): row for row in rows}.values())


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def step_table(rows: list[dict]) -> Table:
    lines = [
        [
            where(row),
            f"{row['shape']} x {row['depth']}",
            row["precision"] + (" (emulated)" if row.get("emulated_products") else ""),
            str(row["frames"]),
            f"{row['adapter_type']} r{row['rank']}",
            ", ".join(way for way in ("compiled", "graphed") if row.get(way)) or "-",
            f"{row['ours_ms']:.0f} ms",
            f"{row['ratio']:.2f}x",
            f"{row['ratio_from_audio']:.2f}x" if row.get("ratio_from_audio") else "-",
            # Emulated products slow the frozen layers that have no adapter.
            "-" if row.get("emulated_products") else f"{row['over_frozen']:.2f}",
            f"{megabytes(row['ours_step_bytes'])} / {megabytes(row['baseline_step_bytes'])}",
        ]
        for row in rows
    ]
    titles = ["device", "model x blocks", "precision", "frames", "adapter", "ours is", "step", "baseline / ours"]
    titles += ["the same with encoding in every step", "ours / frozen"]
    return "Whole training step (bench_step.py)", [*titles, "step MB, ours / baseline"], lines


def packing_table(rows: list[dict]) -> Table:
    lines = [
        [
            where(row),
            f"{row['shape']} x {row['depth']}",
            row["precision"],
            ", ".join(map(str, row["lengths"])),
            f"{row['fill']:.0%}",
            f"{row['packed_ms']:.0f} ms",
            f"{row['ratio']:.2f}x",
            f"{row['ratio_to_full']:.2f}x",
        ]
        for row in rows
    ]
    titles = ["device", "model x blocks", "precision", "frames of the clips", "fill", "packed", "padded / packed"]
    return "Clips of unequal length (bench_packing.py)", [*titles, "unmasked padded / packed"], lines


def peft_table(rows: list[dict]) -> Table:
    lines = [
        [
            where(row),
            row["dtype"],
            f"{row['adapter_type']} r{row['rank']}, {row['tokens']} tokens",
            f"{row['layer']} {row['fan_in']} to {row['fan_out']}",
            f"{row['ours_ms']['median']:.2f} ms",
            f"{row['peft_ms']['median'] / row['ours_ms']['median']:.2f}x",
        ]
        for row in rows
    ]
    titles = ["device", "precision", "adapter", "layer", "ours", "PEFT / ours"]
    return "Adapted layers against PEFT (bench_peft.py)", titles, lines


def gpu_table(rows: list[dict]) -> Table:
    lines = [
        [
            row["file"],
            row["device"],
            f"{row['shape']}, {row['frames']} frames",
            f"{row['adapter_type']} r{row['rank']}",
            ", ".join(way for way in ("compiled", "graphed") if row.get(way)) or "-",
            f"{row['ours_ms']:.1f} ms",
            ratio(row.get("over_frozen")),
            ratio(row.get("ratio")),
            ratio(row.get("over_floor")),
            ratio(row.get("unequal_over_equal")),
            f"{megabytes(row.get('total_bytes'))} / {megabytes(row.get('recomputing_total_bytes'))}",
        ]
        for row in rows
    ]
    heads = [
        "file",
        "device",
        "model",
        "adapter",
        "ours is",
        "step",
        "ours / frozen",
        "baseline / ours",
        "ours / floor",
    ]
    return (
        "Whole training step on a GPU (gpu_check.py step)",
        [*heads, "unequal / equal", "MB, all / recomputing"],
        lines,
    )


def blocks_table(rows: list[dict]) -> Table:
    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    lines = [
        [
            where(row),
            row["dtype"],
            f"{row['shape']}, {row['tokens']} tokens",
            f"{row['adapter_type']} r{row['rank']}",
            f"{row['milliseconds']:.1f} ms",
            f"{row['over_frozen']:.2f}",
            times(row["materialised_over_factored"]),
            times(row["compiled_over_factored"]),
            " / ".join(megabytes(row["layer_peak_bytes"][form]) for form in ("factored", "frozen", "materialised")),
        ]
        for row in rows
    ]
    titles = ["device", "precision", "layers of one block", "adapter", "ours", "ours / frozen", "materialised / ours"]
    titles += ["materialised, compiled / ours", "MB of the largest layer, ours / frozen / materialised"]
    return "Adapted layers (bench_adapted_linear.py)", titles, lines


def where(row: dict) -> str:
    return f"{row['device']}, {row['threads']} threads" if "x86" in row["device"] else row["device"]


def markdown(table: Table) -> str:
    title, heads, lines = table
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def bars(path: Path, title: str, labels: list[str], values: list[float], unit: str, line: float) -> None:
    """A horizontal bar per case; ``line`` marks where both sides are equal."""
    # Imported here: tables need no pictures.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.32 * len(labels)), layout="constrained")
    drawn = axes.barh(labels[::-1], values[::-1], color="#3b6ea5")
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(line, color="black", linewidth=0.8)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.12)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def draw(directory: Path, kinds: dict[str, list[dict]]) -> list[str]:
    """One picture per kind that has rows; returns their file names."""
    labels = {
        "step": lambda row: (
            f"{row['adapter_type']} r{row['rank']}, {row['frames']} frames, {row['precision']}"
            + (", compiled" if row.get("compiled") else "")
        ),
        "layers": lambda row: f"{row['adapter_type']} r{row['rank']}, {row['tokens']} tokens, {row['dtype']}",
        "packing": lambda row: f"fill {row['fill']:.0%}: {', '.join(map(str, row['lengths']))}",
        "peft": lambda row: f"{row['layer']}, {row['adapter_type']}, {row['dtype']}",
    }
    ratios = {
        "step": lambda row: row["ratio"],
        "layers": lambda row: row["materialised_over_factored"],
        "packing": lambda row: row["ratio"],
        "peft": lambda row: row["peft_ms"]["median"] / row["ours_ms"]["median"],
    }
    titles = {
        "step": "Training step: time of the reference-like baseline over ours",
        "layers": "Layers of one block, forward and backward: time of the materialised form over ours",
        "packing": "Unequal clips: time of the padded batch over the packed one",
        "peft": "One layer, forward and backward: PEFT's time over ours",
    }
    made = []
    for kind, rows in kinds.items():
        # A baseline slowed by emulated products would dwarf what is comparable.
        rows = [row for row in rows if not row.get("emulated_products")]
        if rows:
            made.append(f"{kind}.png")
            values = [ratios[kind](row) for row in rows]
            bars(directory / made[-1], titles[kind], [labels[kind](row) for row in rows], values, "times faster", 1.0)
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    directory = parser.parse_args(arguments).results
    step_case = ("device", "shape", "depth", "precision", "frames", "adapter_type", "rank", "compiled")
    kinds = {
        "step": newest(read(directory, "step"), step_case),
        "layers": newest(read_blocks(directory), ("device", "dtype", "shape", "tokens", "adapter_type", "rank")),
        "packing": newest(read(directory, "packing"), ("device", "shape", "depth", "precision", "lengths")),
        "peft": newest(read(directory, "peft"), ("device", "dtype", "adapter_type", "rank", "tokens", "layer")),
    }
    # As it was before adapted weights were formed once a step; what a later run measures stands beside it.
    gpu = [*read(directory / "before", "gpu_step"), *read(directory, "gpu_step")]
    tables = {"step": step_table, "layers": blocks_table, "packing": packing_table, "peft": peft_table}
    pictures = draw(directory, kinds)
    text = ["# Measurements", "", "Made by `python kernels/benchmarks/report.py` from the files beside this one.", ""]
    text += [markdown(tables[kind](rows)) for kind, rows in kinds.items() if rows]
    text += [markdown(gpu_table(gpu))] if gpu else []
    text += [OTHERS] if (directory / "before").is_dir() else []
    text += [f"![{name}]({name})" for name in pictures]
    (directory / "README.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
