"""How much of a small update survives rounding, by way of computing: one layer's output, and 100 steps of training.

    python kernels/benchmarks/bench_small_adapters.py --out kernels/benchmarks/results/small_adapters_cpu.json

Ways to multiply with W' over a frozen bfloat16 weight W0; all but the first train under bfloat16 autocast:

    float32         everything in float32
    reference       as the reference trains: W' computed at each use, in bfloat16 (adapters.md 1.3)
    formed          W' computed in float32 and rounded once to bfloat16
    factored        base and factors separately, bfloat16 products: x W0^T is rounded before the branch is added
    factored, wide  the same with float32 products, rounded once: as on CPUs without bfloat16 instructions

This measures values, not times: CPUs without bfloat16 instructions emulate them for the other ways.

Legend: N tokens, O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from results_file import ROOT, write_result
from sa3dist_kernels import ADAPTER_TYPES, effective_weight_reference, frozen_constants, frozen_products
from sa3dist_kernels.factored_linear import scalings
from sa3dist_kernels.formed_reference import form_reference
from sa3dist_kernels.weight_norms import Layer
from safetensors.torch import load_file, save_file
from step_sides import Materialised, materialise
from torch import nn

import sa3dist
from sa3dist import config, flow
from sa3dist.adapters import adapted_layers, adapter_parameters, attach_adapter, effective_weight
from sa3dist.adapters.layers import AdaptedLayer, AdapterTensors
from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.model.base import Base
from sa3dist.parallel.flat_adamw import BETAS, EPSILON
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.loss import micro_batch_loss
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.trainer import Trainer

CPU = torch.device("cpu")
WIDE = "factored, wide"
WAYS = ("float32", "reference", "formed", "factored", WIDE)
LAYER_TYPES = ("lora", "dora-rows", "dora-cols", "bora")
# |s Delta| / |W0|, Frobenius norms: one per half decade.
RATIOS = tuple(10 ** (-half / 2) for half in range(10, 1, -1))
SIDE, RANK, TOKENS = 1024, 16, 256

GOLDEN = ROOT / "tests/golden"
TRAINED_TYPES = ("lora", "dora-rows")
TRAINED_RANK, WEIGHT_DECAY = 8, 0.01
LEARNING_RATES, STEPS, REPORTED = (1e-5, 1e-4), 100, (10, 50, 100)
SECONDS = (1.0, 30.0)


@contextlib.contextmanager
def bf16_products(native: bool = True) -> Iterator[None]:
    """Let layers multiply in bfloat16, as on a GPU, or in float32, as on a CPU without bfloat16, on any CPU."""
    original = frozen_products.cpu_multiplies
    frozen_products.cpu_multiplies = lambda dtype: native or dtype == torch.float32
    try:
        yield
    finally:
        frozen_products.cpu_multiplies = original


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def share(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The projection of ``actual`` on ``expected``; 1 if they are equal."""
    return float((actual * expected).sum() / expected.square().sum())


# One layer.


def make_layer(name: str, ratio: float, moved: bool, side: int = SIDE) -> AdaptedLayer:
    """A layer of rank 16 over a bfloat16 weight; its update has ``ratio`` times the weight's Frobenius norm.

    moved   whether magnitudes have changed too, each by about ``ratio`` of itself
    """
    draw, kind = torch.Generator().manual_seed(0), ADAPTER_TYPES[name]
    linear = nn.Linear(side, side, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(torch.randn(side, side, generator=draw) / side**0.5)
    weight = linear.weight.float()
    left_OR, right_RI = torch.randn(side, RANK, generator=draw), torch.rand(RANK, side, generator=draw)
    trained = {"lora_A": (2 * right_RI - 1) / side**0.5}
    trained["lora_B"] = ratio * weight.norm() / (left_OR @ trained["lora_A"]).norm() * left_OR
    for magnitude, dim in ((kind.row_magnitude, 1), (kind.col_magnitude, 0)):
        if magnitude:
            norms = weight.norm(dim=dim)
            trained[magnitude] = norms * (1 + moved * ratio * torch.randn(norms.shape, generator=draw))
    return AdaptedLayer(linear, kind, AdapterTensors(trained, frozen_constants(weight)), 1.0)


def factored_in_full(layer: AdaptedLayer, x: torch.Tensor) -> torch.Tensor:
    """The factored form with bfloat16 operands, whose two products are added and scaled in float64."""
    kind, trained = layer.kind, layer.trained()
    bf16 = torch.bfloat16
    frozen = Layer(kind, layer.scale, layer.weight, layer.adapter.frozen, bf16, torch.float32)
    core, left = trained["lora_A"], trained["lora_B"]
    rows, cols = scalings(frozen, core, left, trained.get(kind.row_magnitude), trained.get(kind.col_magnitude))
    z = x if cols is None else (x * cols.gain_I).to(bf16)
    down = z @ core.t().to(bf16)
    p = z.double() @ layer.weight.double().t() + layer.scale * down.double() @ left.to(bf16).double().t()
    return p if rows is None else p * rows.gain_O.double()


@torch.no_grad()
def outputs(layer: AdaptedLayer, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By way, in float64: the output before and after rounding to the output dtype.

    x   (N, I) in bfloat16
    The wide factored form differs from float32 only in the output dtype.
    """
    weight, trained = layer.weight, layer.trained()
    with torch.autocast("cpu", torch.bfloat16), bf16_products():
        reference = Materialised(layer)(weight)
        factored = layer(x)
    with torch.autocast("cpu", torch.bfloat16), bf16_products(native=False):
        wide = layer(x)
    formed = form_reference(weight, trained, layer.kind, layer.scale).weight_OI().to(torch.bfloat16)
    # With a float32 x, outside autocast, the layer computes in float32.
    single = layer(x.float()).double()
    return {
        "float32": (single, single),
        WIDE: (single, wide.double()),
        "reference": (x.double() @ reference.double().t(), (x @ reference.t()).double()),
        "formed": (x.double() @ formed.double().t(), (x @ formed.t()).double()),
        "factored": (factored_in_full(layer, x), factored.double()),
    }


@torch.no_grad()
def layer_rows(name: str, ratio: float, moved: bool = False, side: int = SIDE, tokens: int = TOKENS) -> list[dict]:
    """Errors of each way's x (W' - W0)^T.

    error         before rounding the output, relative to the exact value in float64
    output_error  after rounding the output to the way's dtype
    kept          share of the exact change in the rounded output: its difference from the frozen layer's rounded
                  output, projected on the exact change over all tokens
    """
    layer = make_layer(name, ratio, moved, side)
    x = torch.randn(tokens, side, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    base = x.double() @ layer.weight.double().t()
    exact_params = {key: value.double() for key, value in layer.trained().items()}
    exact = x.double() @ effective_weight_reference(layer.weight, exact_params, layer.kind, layer.scale).t() - base
    frozen_output = base.to(torch.bfloat16).double()
    rows = []
    for way, (in_full, rounded) in outputs(layer, x).items():
        start = base if way == "float32" else frozen_output
        row = {"adapter_type": name, "ratio": ratio, "magnitudes_moved": moved, "way": way}
        row |= {"error": relative(in_full - base, exact), "output_error": relative(rounded - base, exact)}
        rows.append(row | {"kept": share(rounded - start, exact)})
    return rows


# Training.


def write_rounded_base(folder: Path) -> None:
    """Write the tiny recorded base with weights rounded to bfloat16, so that all ways start from the same values."""
    weights = load_file(GOLDEN / "tiny-sa3/model.safetensors")
    rounded = {name: value.to(torch.bfloat16).to(value.dtype) for name, value in weights.items()}
    save_file(rounded, folder / "model.safetensors")
    shutil.copy(GOLDEN / "tiny-sa3/model_config.json", folder)


def make_batches(base: Base, steps: int) -> list[MicroBatch]:
    """The recorded clips and prompts, with fresh noise and timesteps for each step."""
    recorded = load_file(GOLDEN / "training/tiny_sa3_step_dora_rows.safetensors")
    prompts = load_file(GOLDEN / "tiny-sa3/golden.safetensors")
    draw, latents, batches = torch.Generator().manual_seed(0), recorded["latents"], []
    frames = [flow.effective_frames(s, base.sample_rate_hz, base.samples_per_frame) for s in SECONDS]
    for _ in range(steps):
        noise = torch.randn(latents.shape, generator=draw)
        t_B = flow.shift_timesteps(flow.sample_timesteps(len(SECONDS), draw), torch.tensor(frames))
        noised, target = flow.noise_latents(latents, noise, t_B)
        batch = MicroBatch(
            clips=["a", "b"],
            latents_BDT=latents,
            noised_BDT=noised,
            target_BDT=target,
            t_B=t_B,
            keep_BT=None,
            inpaint_mask_B1T=recorded["inpaint_mask"],
            hidden_BLH=prompts["prompt.hidden_states"][[0, 2]],
            prompt_mask_BL=prompts["prompt.mask"][[0, 2]],
            seconds_total_B=torch.tensor(SECONDS),
            drop_cross_B=torch.zeros(len(SECONDS), dtype=torch.bool),
            has_context=bool(recorded["inpaint_mask"].any()),
            silent_crops=0,
        )
        batches.append(batch)
    return batches


@dataclasses.dataclass
class Run:
    """One way's training: losses per step, losses of the untrained adapter, and the trained tensors by name."""

    losses: torch.Tensor
    untrained: torch.Tensor
    trained: dict[str, torch.Tensor]


def make_base(folder: Path, way: str, name: str) -> Base:
    base = sa3dist.load_base(folder, dtype=torch.float32 if way == "float32" else torch.bfloat16)
    attach_adapter(base, name, rank=TRAINED_RANK, seed=1)
    return base


def our_step(base: Base, settings) -> tuple[dict[str, nn.Parameter], Callable[[MicroBatch], float]]:
    """The step of our trainer."""
    plan = RunPlan(STEPS, 1, len(SECONDS), len(SECONDS), 42, {}, ["a", "b"])
    trained = adapter_parameters(base)
    trainer = Trainer(base, trained, settings, plan, Group(0, 1, CPU))
    trainer.engine.zero()
    return trained, lambda batch: trainer.take_step(iter([batch]), StopRequest())["loss"]


def reference_step(base: Base, settings) -> tuple[dict[str, nn.Parameter], Callable[[MicroBatch], float]]:
    trained = materialise(base)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=settings.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY
    )

    def step(batch: MicroBatch) -> float:
        optimizer.zero_grad()
        loss = micro_batch_loss(base, batch, settings)["loss"]
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return trained, step


def train(folder: Path, way: str, name: str, learning_rate: float, batches: list[MicroBatch]) -> Run:
    values = {
        "audio_data_url": "clips.zip",
        "learning_rate": learning_rate,
        "weight_decay": WEIGHT_DECAY,
        "mixed_precision": "no" if way == "float32" else "bf16",
        "adapter_products": "formed" if way == "formed" else "factored",
    }
    settings, base = config.build(values), make_base(folder, way, name)
    make_step = reference_step if way == "reference" else our_step
    with bf16_products(native=way != WIDE):
        trained, step = make_step(base, settings)
        with torch.no_grad():
            untrained = torch.stack([micro_batch_loss(base, batch, settings)["loss"] for batch in batches])
        losses = torch.tensor([step(batch) for batch in batches], dtype=torch.float64)
    return Run(losses, untrained.double(), {key: value.detach().clone() for key, value in trained.items()})


@torch.no_grad()
def update_of(folder: Path, name: str, trained: dict[str, torch.Tensor]) -> torch.Tensor:
    """W' - W0 of all layers in one float32 vector, for these trained tensors."""
    base = make_base(folder, "float32", name)
    for key, parameter in adapter_parameters(base).items():
        parameter.copy_(trained[key])
    layers = adapted_layers(base)
    changes = [effective_weight(base, key) - layers[key].weight for key in layers]
    return torch.cat([change.flatten() for change in changes])


def training_rows(folder: Path, name: str, learning_rate: float, steps: int = STEPS) -> list[dict]:
    """The distance of each way from float32.

    curve      relative distance of the losses of the first steps
    learned    the same for the reduction of the loss by training (untrained minus trained, each in its own way)
    weights    relative distance of the trained W' - W0
    """
    batches = make_batches(sa3dist.load_base(folder), steps)
    runs = {way: train(folder, way, name, learning_rate, batches) for way in WAYS}
    exact, rows = runs["float32"], []
    update = update_of(folder, name, exact.trained)
    for way, run in runs.items():
        row = {"adapter_type": name, "learning_rate": learning_rate, "way": way, "losses": run.losses.tolist()}
        first = [count for count in REPORTED if count <= steps]
        row["curve"] = {count: relative(run.losses[:count], exact.losses[:count]) for count in first}
        gained, expected = run.untrained - run.losses, exact.untrained - exact.losses
        row["learned"] = {count: relative(gained[:count], expected[:count]) for count in first}
        row["weights"] = relative(update_of(folder, name, run.trained), update)
        rows.append(row)
    return rows


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    options = parser.parse_args(words)
    # One thread: layers are small, and the order of sums stays fixed.
    torch.set_num_threads(1)
    layer, training = [], []
    for name in LAYER_TYPES:
        for moved in (False, True) if name != "lora" else (False,):
            for ratio in RATIOS:
                rows = layer_rows(name, ratio, moved)
                layer += rows
                summary = "  ".join(f"{r['way']} {r['error']:.1e} {r['kept']:.2f}" for r in rows)
                print(f"{name:10} {'moved' if moved else ''} {ratio:.1e}  {summary}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_rounded_base(Path(folder))
        for name in TRAINED_TYPES:
            for rate in LEARNING_RATES:
                rows = training_rows(Path(folder), name, rate, options.steps)
                training += rows
                for row in rows:
                    print(
                        name, rate, *(f"{key} {row[key]}" for key in ("way", "curve", "learned", "weights")), flush=True
                    )
    return write_result(options, CPU, layer=layer, training=training)


if __name__ == "__main__":
    main()
