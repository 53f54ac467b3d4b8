"""A micro batch of clips of unequal length, forward and backward: packed against padded.

Both sides give the same loss and gradients, because padded frames are not attended to. A third side is the padded batch
without a mask, as if all clips had full length: the minimum cost of any padded computation. With --compile the packed
batch also runs with its element-wise operations compiled. Runs are interleaved and medians compared.

    python kernels/benchmarks/bench_packing.py --shape small-music-base --depth 4 --lengths 1024,512,320,192 --compile
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from results_file import append_row, environment
from sa3dist_kernels import ADAPTER_TYPES
from step_sides import DTYPES, SHAPES, attach, make_base, make_batch
from timing import interleaved, peak_bytes, summary

from sa3dist import adapters, flow
from sa3dist.data.batches.micro_batch import without_common_padding
from sa3dist.model.compiled import compile_elementwise
from sa3dist.model.packing import Packing
from sa3dist.model.token_layout import Packed, Padded

GRADIENT_TOLERANCE = {"bf16": 0.3, "fp32": 1e-3}
SIDES = ("packed", "padded", "full")


class Batch:
    """A padded batch, and each side's step on it."""

    def __init__(self, options, device: torch.device) -> None:
        self.base = make_base(options.shape, options.depth, device, DTYPES[options.precision])
        attach(self.base, options.adapter_type, options.rank)
        self.autocast = options.precision == "bf16"
        lengths = torch.tensor(options.lengths)
        keep = torch.arange(max(options.lengths))[None] < lengths[:, None]
        self.values = make_batch(self.base, len(lengths), keep.shape[1])
        # As from the loader: one position of padding stands for the rest.
        self.prompt = without_common_padding(self.values["prompt"], self.values["prompt_mask"])
        self.fill = keep.float().mean().item()
        self.packing = Packing.of(keep).to(device)
        self.keep = keep.to(device)
        self.trained = adapters.adapter_parameters(self.base)

    def step(self, side: str) -> torch.Tensor:
        """Forward, loss, backward; returns the loss."""
        batch = self.values
        frames, memory = self.keep.shape[1], self.base.dit.transformer.memory
        layout = {
            "packed": lambda: Packed(self.packing, memory),
            "padded": lambda: Padded(frames, memory, self.keep),
            "full": lambda: Padded(frames, memory),
            "compiled": lambda: Packed(self.packing, memory),
        }[side]
        compile_elementwise(self.base.dit, "inductor" if side == "compiled" else None)
        # Override the network's choice.
        self.base.dit.layouts = lambda *_: [layout()]
        for parameter in self.trained.values():
            parameter.grad = None
        inputs = batch["noised"], batch["t"], *self.prompt, batch["seconds"]
        with torch.autocast(self.keep.device.type, torch.bfloat16, enabled=self.autocast):
            velocity = self.base.velocity(*inputs, prompt_length=self.base.prompt_tokens)
        loss, _, _ = flow.masked_loss(velocity, batch["target"], self.keep, batch["inpaint_mask"])
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: value.grad.clone() for name, value in self.trained.items() if value.grad is not None}


def distance(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance over all gradients."""
    squares = [((gradients[name] - value).square().sum(), value.square().sum()) for name, value in expected.items()]
    difference, total = (torch.stack(column).sum().item() for column in zip(*squares, strict=True))
    return (difference / total) ** 0.5


def measure(options, device: torch.device) -> dict:
    batch = Batch(options, device)
    losses, gradients = {}, {}
    sides = [*SIDES, "compiled"] if options.compile else SIDES
    for side in set(sides) - {"full"}:
        losses[side], gradients[side] = batch.step(side).item(), batch.gradients()
    expected = gradients.pop("padded")
    apart = max(distance(of_side, expected) for of_side in gradients.values())
    gradients.clear()
    times = interleaved({side: lambda side=side: batch.step(side) for side in sides}, options.repeats, device)
    spans = {side: summary(values) for side, values in times.items()}
    medians = {side: span["median"] for side, span in spans.items()}
    return {
        "shape": options.shape,
        "depth": len(batch.base.dit.transformer.layers),
        "adapter_type": options.adapter_type,
        "rank": options.rank,
        "precision": options.precision,
        "lengths": options.lengths,
        "fill": round(batch.fill, 3),
        "repeats": options.repeats,
        **{f"{side}_ms": round(value, 3) for side, value in medians.items()},
        "spread_ms": {side: [round(span["min"], 3), round(span["max"], 3)] for side, span in spans.items()},
        "ratio": round(medians["padded"] / medians["packed"], 3),
        "ratio_to_full": round(medians["full"] / medians["packed"], 3),
        "ratio_of_compiling": round(medians["packed"] / medians["compiled"], 3) if options.compile else None,
        **{f"{side}_step_bytes": peak_bytes(lambda side=side: batch.step(side), device) for side in sides},
        "losses": losses,
        "gradient_distance": apart,
        "gradients_agree": apart <= GRADIENT_TOLERANCE[options.precision],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small-music-base")
    parser.add_argument("--depth", type=int, default=4, help="transformer blocks; 0 = the released number")
    parser.add_argument("--lengths", default="1024,512,320,192", help="frames of every clip, comma-separated")
    parser.add_argument("--adapter-type", choices=ADAPTER_TYPES, default="dora-rows", metavar="TYPE")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="bf16: base and autocast; fp32: neither")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="measure the compiled packed step as well")
    parser.add_argument("--json", type=Path, help="append the measurement as one JSON object")
    options = parser.parse_args(arguments)
    options.depth = options.depth or None
    options.lengths = [int(length) for length in options.lengths.split(",")]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    row = {**environment(device), **measure(options, device)}
    print(json.dumps(row), flush=True)
    print(
        f"{row['shape']} clips of {row['lengths']} frames (fill {row['fill']:.0%}), {row['adapter_type']} "
        f"r{row['rank']} {row['precision']}: packed {row['packed_ms']:.1f} ms, padded {row['padded_ms']:.1f} ms "
        f"({row['ratio']:.2f}x), full {row['full_ms']:.1f} ms ({row['ratio_to_full']:.2f}x), "
        + (f"compiled {row['compiled_ms']:.1f} ms ({row['ratio_of_compiling']:.2f}x), " if options.compile else "")
        + f"gradients {row['gradient_distance']:.1e} {'agree' if row['gradients_agree'] else 'DIFFER'}"
    )
    append_row(options.json, row)
    return 0 if row["gradients_agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
