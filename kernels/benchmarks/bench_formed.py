"""Times FORM and FINISH of all layers of the medium model, and counts the bytes they move.

    python kernels/benchmarks/bench_formed.py --type dora-rows bora --rank 16 --out formed.json
    python kernels/benchmarks/bench_formed.py --sweep --out formed_tiles.json

Real shapes, random weights and trained tensors. On CUDA each is captured as a graph, so that host time counts only in
"launched". The first layer of each shape is compared with float64. --sweep tries other tiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from results_file import ResultsFile
from sa3dist_kernels import ADAPTER_TYPES, frozen_constants, triton_support
from sa3dist_kernels.formed_reference import finish_reference, form_reference
from sa3dist_kernels.formed_spec import FormedSpec
from sa3dist_kernels.formed_weights import FormedWeights
from timing import interleaved, summary

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# (fan_out, fan_in) of the medium base's adapted layers -> number of layers.
MEDIUM = {
    (7680, 1536): 24, (12288, 1536): 24, (1536, 6144): 24, (1536, 1536): 74, (3072, 1536): 24, (4608, 1536): 24,
    (9216, 1536): 1, (256, 1536): 1, (1536, 768): 1, (1536, 257): 1, (256, 256): 1, (768, 256): 1,
}  # fmt: skip
TINY = {(18, 16): 1, (20, 19): 1}


def make_specs(shapes: dict, kind, rank: int, dtype: torch.dtype, device: torch.device):
    """Layers whose trained tensors share one flat buffer and whose raw sums share another, which is also returned."""
    sizes = [size for size, count in shapes.items() for _ in range(count)]
    named = [kind.parameter_shapes(*size, rank) for size in sizes]
    count = sum(torch.Size(shape).numel() for shapes_ in named for shape in shapes_.values())
    values, sums = torch.randn(count, device=device), torch.randn(count, device=device)
    specs, begin = [], 0
    for (fan_out, fan_in), shapes_ in zip(sizes, named, strict=True):
        params, grads = {}, {}
        for name, shape in shapes_.items():
            end = begin + torch.Size(shape).numel()
            params[name], grads[name] = values[begin:end].view(shape), sums[begin:end].view(shape)
            # As in advanced training: an update of a tenth of the weight, and magnitudes near its norms.
            params[name].mul_(0.3 / rank**0.5 if name == "lora_B" else fan_in**-0.5 if name == "lora_A" else 0.1)
            if name.startswith("magnitude"):
                params[name].add_(1)
            begin = end
        weight = (torch.randn(fan_out, fan_in, device=device) / fan_in**0.5).to(dtype)
        bases = [torch.randn(side, rank, device=device) / side**0.5 for side in (fan_out, fan_in)]
        specs.append(
            FormedSpec(weight, params, grads, kind, 1.0, frozen_constants(weight, *bases) if kind.xs else None)
        )
    return specs, sums


class Oracle:
    """W' and gradients of one layer of each shape, in float64."""

    def __init__(self, specs: list[FormedSpec], sums: torch.Tensor) -> None:
        self.specs, self.sums, self.first, self.expected = specs, sums, sums.clone(), {}
        for index in {(spec.fan_out, spec.fan_in): index for index, spec in enumerate(specs)}.values():
            spec = specs[index]
            params = {key: value.double() for key, value in spec.params.items()}
            grads = {key: value.double() for key, value in spec.grads.items()}
            bases = None if spec.bases is None else tuple(base.double() for base in spec.bases)
            reference = form_reference(spec.weight_OI.double(), params, spec.kind, spec.scale, bases)
            finish_reference(reference, grads, spec.kind, spec.scale, bases)
            self.expected[index] = reference.weight_OI(), grads

    def errors(self, formed: FormedWeights) -> dict[str, float]:
        """The largest relative error of any W', and of any gradient."""
        self.sums.copy_(self.first)
        formed.form()
        formed.finish()
        weight = max(_error(formed.layers[at].weight_OI, exact) for at, (exact, _) in self.expected.items())
        gradient = max(
            _error(self.specs[at].grads[key], grads[key]) for at, (_, grads) in self.expected.items() for key in grads
        )
        return {"weight": weight, "gradient": gradient}


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def recorded(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``run`` as a CUDA graph, after a warm-up; on a CPU ``run`` itself."""
    run()
    if device.type != "cuda":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measured(formed: FormedWeights, options, device: torch.device) -> dict[str, Any]:
    """Milliseconds of both; bytes and rate if the kernels ran."""
    runs = {"form": formed.form, "finish": formed.finish}
    variants = {name: recorded(run, device) for name, run in runs.items()}
    variants |= {f"{name} launched": run for name, run in runs.items()}
    warm_up = 2 if device.type == "cuda" else 0
    row: dict[str, Any] = {
        name: summary(times) for name, times in interleaved(variants, options.rounds, device, warm_up).items()
    }
    groups = getattr(formed.forms, "groups", [])
    if groups:
        from formed_bytes import finish_bytes, form_bytes

        for name, count in (("form", form_bytes), ("finish", finish_bytes)):
            row[f"{name}_bytes"] = sum(sum(map(sum, count(group).values())) for group in groups)
            row[f"{name}_gb_per_s"] = row[f"{name}_bytes"] / row[name]["median"] / 1e6
    return row


def candidates(kind, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """(description, tiles): the default, rows read twice if the default keeps them, then one change at a time."""
    from sa3dist_kernels.formed_blocks import ResidentTile, default_tiles

    base = default_tiles(rank, dtype)
    yield "default", base
    if base.form_resident is not None and kind.rows and not (kind.cols or kind.xs):
        yield "rows read twice", dataclasses.replace(base, form_resident=None)
        yield "resident rows, 8 warps", dataclasses.replace(base, form_resident=ResidentTile(16, 8, 96))
    for change in ({"registers": 128}, {"stages": 4}, {"splits": 8, "registers": 128}):
        tile = dataclasses.replace(base.form_rows, **change)
        yield f"rows {change}", dataclasses.replace(base, form_rows=tile, finish_rows=tile)
    for change in ({"block_i": 128}, {"block_i": 256}, {"stages": 4}, {"block_o": 64, "warps": 8}):
        columns = {
            side: dataclasses.replace(getattr(base, side), **change) for side in ("form_columns", "finish_columns")
        }
        yield f"columns {change}", dataclasses.replace(base, **columns)
    yield "max_rows 2048", dataclasses.replace(base, max_rows=2048)


def rows(options, device: torch.device) -> Iterator[dict[str, Any]]:
    dtype = DTYPES[options.dtype]
    for name in options.type:
        kind = ADAPTER_TYPES[name]
        for rank in options.rank:
            specs, sums = make_specs(TINY if options.tiny else MEDIUM, kind, rank, dtype, device)
            oracle = Oracle(specs, sums)
            impl = "triton" if triton_support.interpreting() else "auto"
            for what, tiles in candidates(kind, rank, dtype) if options.sweep else [("default", None)]:
                formed = FormedWeights(specs, dtype, impl, tiles)
                row = {"adapter_type": name, "rank": rank, "tiles": what, "error": oracle.errors(formed)}
                yield row | measured(formed, options, device)


def line(row: dict[str, Any]) -> str:
    text = f"{row['adapter_type']:13} r{row['rank']:<4}"
    for name in ("form", "finish"):
        text += f" {name} {row[name]['median']:8.3f} ms"
        if f"{name}_bytes" in row:
            text += f" {row[f'{name}_bytes'] / 1e9:7.3f} GB {row[f'{name}_gb_per_s']:6.0f} GB/s"
        text += f" launched {row[f'{name} launched']['median']:7.3f}"
    text += "  error" + "".join(f" {name} {value:.1e}" for name, value in row["error"].items())
    return f"{text}  {row['tiles']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--type", nargs="+", choices=ADAPTER_TYPES, default=["dora-rows"])
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", action="store_true", help="other tiles, one change at a time (needs CUDA)")
    parser.add_argument("--tiny", action="store_true", help="a few small layers: checks the benchmark")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after every row")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.sweep and device.type != "cuda":
        parser.error("--sweep times the kernels' tiles: it needs --device cuda")
    torch.manual_seed(0)
    named = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    results = ResultsFile.start(options.out, device, named)
    for row in rows(options, device):
        results.add(**row)
        print(line(row), flush=True)
    results.set(state="finished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
