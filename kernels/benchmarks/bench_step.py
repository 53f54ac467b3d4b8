"""One training step, ours against the reference's way of doing it: same process, same weights, same loss.

The baseline forms every adapted weight in float32 by parametrisation, lets autograd differentiate through it, and
recomputes every block; both sides use the same network code, autocast and AdamW. Runs are interleaved; medians count.

    python kernels/benchmarks/bench_step.py --shape small-music-base --depth 4 --frames 128 --adapter-type dora-rows
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from sa3dist_kernels import ADAPTER_TYPES, effective_weight_reference, frozen_constants
from torch import nn
from torch.nn.utils import parametrize

from sa3dist import adapters, flow
from sa3dist.model.random_weights import random_base
from sa3dist.parallel.flat import BETAS, EPSILON, FlatAdapters

SHAPES = ("small-music-base", "small-sfx-base", "medium-base")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Losses of one step, computed in another order and, with bf16, rounded at other places.
LOSS_TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}


class Materialised(nn.Module):
    """W' formed anew at every use of the weight, in the adapter's float32, returned in the base's dtype."""

    def __init__(self, weight: torch.Tensor, kind, trained: dict[str, torch.Tensor], scale: float, frozen) -> None:
        super().__init__()
        self.kind, self.scale, self.frozen = kind, scale, frozen
        self.trained = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in trained.items()})

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        merged = effective_weight_reference(weight, dict(self.trained), self.kind, self.scale, self.frozen)
        return merged.to(weight.dtype)


def make_base(options, device: torch.device):
    """A random base with an adapter moved off its initial values, the same for the same options."""
    base = random_base(options.shape, depth=options.depth, device=device, dtype=DTYPES[options.precision], seed=1)
    adapters.attach_adapter(base, adapter_type=options.adapter_type, rank=options.rank, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(base).values():
            noise = torch.randn(parameter.shape, generator=generator).to(device)
            parameter.mul_(1 + 0.02 * noise).add_(0.002 * noise)
    return base


def materialise(base) -> list[nn.Parameter]:
    """Replace the factored layers by parametrised ones of equal value; returns the trained parameters."""
    trained: list[nn.Parameter] = []
    layers = list(adapters.adapted_layers(base).values())
    adapters.detach_adapter(base)
    for layer in layers:
        frozen = frozen_constants(layer.weight.float(), layer.adapter.frozen.left_OR, layer.adapter.frozen.right_IR)
        made = Materialised(layer.weight, layer.kind, layer.trained(), layer.scale, frozen)
        parametrize.register_parametrization(layer.original, "weight", made, unsafe=True)
        trained += made.trained.values()
    base.gradient_checkpointing = True
    return trained


class Side:
    """One of the two trainers: a base, its optimiser, and the step."""

    def __init__(self, options, device: torch.device, baseline: bool) -> None:
        self.options, self.device = options, device
        self.base = make_base(options, device)
        if baseline:
            trained = materialise(self.base)
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=BETAS, eps=EPSILON, weight_decay=0.01)
            self.zero = self.optimizer.zero_grad
        else:
            flat = FlatAdapters(adapters.adapter_parameters(self.base), 1e-5, 0.01, scalars=0)
            self.optimizer, self.zero = flat.optimizer, flat.zero
        self.batch = make_batch(options, self.base, device)

    def step(self) -> torch.Tensor:
        """Forward, loss, backward, AdamW. Returns the loss."""
        batch = self.batch
        self.zero()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            velocity = self.base.velocity(
                batch["noised"],
                batch["t"],
                batch["prompt"],
                batch["prompt_mask"],
                batch["seconds"],
                inpaint_mask_B1T=batch["inpaint_mask"],
                inpaint_latents_BDT=batch["latents"],
            )
        keep = torch.ones_like(batch["inpaint_mask"][:, 0], dtype=torch.bool)
        loss, _, _ = flow.masked_loss(velocity, batch["target"], keep, batch["inpaint_mask"])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def make_batch(options, base, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (options.batch, base.latent_channels, options.frames)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    t = flow.sample_timesteps(options.batch, generator)
    noised, target = flow.noise_latents(latents, noise, t)
    tokens, width = base.config.prompt.max_length, base.config.cond_dim
    batch = {
        "latents": latents,
        "noised": noised,
        "target": target,
        "t": t,
        "prompt": torch.randn(options.batch, tokens, width, generator=generator),
        "prompt_mask": torch.arange(tokens).expand(options.batch, tokens) < 20,
        "seconds": torch.full((options.batch,), 30.0),
        # As in four of five training samples: nothing given.
        "inpaint_mask": torch.zeros(options.batch, 1, options.frames),
    }
    return {name: value.to(device) for name, value in batch.items()}


def timed(side: Side) -> float:
    """Milliseconds of one step."""
    if side.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        side.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    side.step()
    return 1000 * (time.perf_counter() - begin)


def step_memory(options, device: torch.device, baseline: bool) -> int:
    """Peak bytes that one side's steps need on top of what it holds between them."""
    side = Side(options, device, baseline)
    if device.type == "cuda":
        side.step()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        side.step()
        return torch.cuda.max_memory_allocated(device) - held
    # The first steps have not run yet: the high-water mark up to here is the load, which is larger than the step may
    # be, so the mark is reset (Linux: writing 5 to clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    held = psutil.Process().memory_info().rss
    for _ in range(2):
        side.step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - held


def memory_in_child(arguments: list[str], side: str) -> int:
    """``step_memory`` in a fresh process, where the other side has left no freed pages behind."""
    command = [sys.executable, __file__, *arguments, "--memory-of", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(options, device: torch.device, arguments: list[str]) -> dict:
    """Medians, ratio, losses and peak memory of both sides."""
    ours, baseline = Side(options, device, baseline=False), Side(options, device, baseline=True)
    losses = ours.step().item(), baseline.step().item()
    times: dict[str, list[float]] = {"ours": [], "baseline": []}
    timed(ours), timed(baseline)
    for _ in range(options.repeats):
        times["ours"].append(timed(ours))
        times["baseline"].append(timed(baseline))
    medians = {side: statistics.median(values) for side, values in times.items()}
    del ours, baseline
    if device.type == "cuda":
        torch.cuda.empty_cache()
        memory = {side: step_memory(options, device, side == "baseline") for side in times}
    else:
        memory = {side: memory_in_child(arguments, side) for side in times}
    difference = abs(losses[0] - losses[1]) / abs(losses[1])
    return {
        "shape": options.shape,
        "depth": options.depth,
        "frames": options.frames,
        "batch": options.batch,
        "adapter_type": options.adapter_type,
        "rank": options.rank,
        "precision": options.precision,
        "ours_ms": round(medians["ours"], 2),
        "baseline_ms": round(medians["baseline"], 2),
        "spread_ms": {side: [round(min(v), 2), round(max(v), 2)] for side, v in times.items()},
        "ratio": round(medians["baseline"] / medians["ours"], 3),
        "ours_step_bytes": memory["ours"],
        "baseline_step_bytes": memory["baseline"],
        "ours_loss": losses[0],
        "baseline_loss": losses[1],
        "losses_agree": difference <= LOSS_TOLERANCE[options.precision],
    }


def machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    native = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    return {
        "device": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16_matmul_on_cpu": native,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small-music-base")
    parser.add_argument("--depth", type=int, default=4, help="transformer blocks; 0 = the released number")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--adapter-type", default="dora-rows", help=f"one of {', '.join(ADAPTER_TYPES)}, or all")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="base and autocast; fp32: no autocast")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="append one JSON object per measurement")
    parser.add_argument("--memory-of", choices=["ours", "baseline"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.depth = options.depth or None
    return options


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device = torch.device(options.device)
    if options.memory_of:
        print(step_memory(options, device, options.memory_of == "baseline"))
        return 0
    print(json.dumps(machine(device)), flush=True)
    kinds = list(ADAPTER_TYPES) if options.adapter_type == "all" else [options.adapter_type]
    agree = True
    for kind in kinds:
        options.adapter_type = kind
        row = measure(options, device, [*arguments, "--adapter-type", kind])
        agree = agree and row["losses_agree"]
        print(
            f"{kind:14} ours {row['ours_ms']:9.1f} ms  baseline {row['baseline_ms']:9.1f} ms  {row['ratio']:6.2f}x  "
            f"step memory {row['ours_step_bytes'] / 1e6:7.0f} / {row['baseline_step_bytes'] / 1e6:7.0f} MB  "
            f"losses {row['ours_loss']:.5f} / {row['baseline_loss']:.5f} {'agree' if row['losses_agree'] else 'DIFFER'}",
            flush=True,
        )
        if options.json:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**machine(device), **row}) + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
