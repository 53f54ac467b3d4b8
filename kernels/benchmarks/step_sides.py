"""The sides that bench_step compares: our trainer, training by the reference's method, and the frozen model.

All run the same network code on the same weights and batch, under the same autocast. Our trainer and the frozen model
also run compiled and as CUDA graphs where a long run would; the reference does neither.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sa3dist_kernels import effective_weight_reference, frozen_constants
from sa3dist_kernels.dispatch import obstacle_to
from sa3dist_kernels.frozen_products import product_dtype
from torch import nn
from torch.nn.utils import parametrize

from sa3dist import adapters, flow
from sa3dist.adapters import layers
from sa3dist.adapters.formed import Formed, use_formed_weights
from sa3dist.data.batches.micro_batch import without_common_padding
from sa3dist.model.base import Base
from sa3dist.model.compiled import compile_blocks, compile_elementwise, wants_compile
from sa3dist.model.packing import FilledPacking
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.random_weights import RandomWeights, random_base
from sa3dist.model.released import RELEASED
from sa3dist.model.tiny import tiny_config
from sa3dist.parallel.flat_adamw import BETAS, EPSILON, FlatAdapters
from sa3dist.training.cuda_graphs import wants_graphs
from sa3dist.training.graph_recorder import Recorder
from sa3dist.training.shape_ladder import rung

# The released shapes, and narrow ones that take milliseconds on any machine.
TINY = {"tiny-medium": "medium", "tiny-small": "small"}
SHAPES = (*RELEASED, *TINY)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# So small that all steps of all sides see the same weights; AdamW's time does not depend on it.
LEARNING_RATE, WEIGHT_DECAY = 1e-9, 0.01
ADAPTER_PRODUCTS = "auto"
# The run length that "auto" settings assume: long enough for everything.
STEPS = 1000
# Inputs that get gradients in the frozen model, so that its backward pass covers every layer that is adapted. Not the
# clean latents, which do not enter the network without given context.
INPUTS = ("noised", "t", "prompt", "seconds")


def make_base(shape: str, depth: int | None, device: torch.device, dtype: torch.dtype) -> Base:
    """A base with random weights, of a released or tiny shape; ``depth`` None: the released number of blocks."""
    if shape not in TINY:
        return random_base(shape, depth=depth, device=device, dtype=dtype, seed=1)
    config = parse_model_config(tiny_config(TINY[shape], depth or 2), shape)
    return Base(config, RandomWeights(config, 1, device), device, dtype, text_source=None, encoder=False)


def attach(base: Base, adapter_type: str, rank: int) -> None:
    """Attach an adapter and move it off its initial values; deterministic."""
    with cheap_bases():
        adapters.attach_adapter(base, adapter_type=adapter_type, rank=rank, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(base).values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.mul_(1 + 0.02 * noise).add_(0.002 * noise)


@contextlib.contextmanager
def cheap_bases() -> Iterator[None]:
    """Use random orthonormal bases for -xs types: attaching takes seconds instead of half an hour."""
    exact = layers.singular_bases
    layers.singular_bases = orthonormal_bases
    try:
        yield
    finally:
        layers.singular_bases = exact


def orthonormal_bases(weight_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(weight_OI.numel())
    left_OR, right_IR = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for side in weight_OI.shape)
    return left_OR, right_IR


class Materialised(nn.Module):
    """Parametrisation that computes W' at every use of the weight, differentiable, in the base's dtype.

    As in the reference's training, types with norms compute in float32, lora and -xs types in the base's dtype
    (spec/adapters.md 1.3).
    """

    def __init__(self, layer: layers.AdaptedLayer) -> None:
        super().__init__()
        self.kind, self.scale = layer.kind, layer.scale
        self.trained = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in layer.trained().items()})
        wide = (layer.kind.rows or layer.kind.cols) and not layer.kind.xs
        self.dtype = torch.float32 if wide else layer.weight.dtype
        bases = (layer.adapter.frozen.left_OR, layer.adapter.frozen.right_IR) if layer.kind.xs else ()
        self.frozen = frozen_constants(layer.weight, *bases) if bases else None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        trained = {name: value.to(self.dtype) for name, value in self.trained.items()}
        merged = effective_weight_reference(weight.to(self.dtype), trained, self.kind, self.scale, self.frozen)
        return merged.to(weight.dtype)


def materialise(base: Base) -> dict[str, nn.Parameter]:
    """Replace adapted layers by parametrised ones of equal value, and recompute all blocks in the backward pass.

    Returns the trained parameters by their names in ``adapter_parameters``.
    """
    trained: dict[str, nn.Parameter] = {}
    adapted = adapters.adapted_layers(base)
    adapters.detach_adapter(base)
    for name, layer in adapted.items():
        parametrisation = Materialised(layer)
        parametrize.register_parametrization(layer.original, "weight", parametrisation, unsafe=True)
        trained |= {f"{name}.{adapters.attach.SLOT}.{key}": value for key, value in parametrisation.trained.items()}
    base.gradient_checkpointing = True
    return trained


class Side:
    """One side: a base, its trained tensors, and a step on the batch set by ``use``."""

    def __init__(self, name: str, options, device: torch.device) -> None:
        """options: shape, depth, precision, adapter_type, rank, compile, cuda_graphs."""
        # Our loader evaluates a prompt's padding once and omits zero context; the reference computes both in full.
        self.skips_redundant = name != "baseline"
        self.device = device
        self.autocast = options.precision == "bf16"
        self.base = make_base(options.shape, options.depth, device, DTYPES[options.precision])
        attach(self.base, options.adapter_type, options.rank)
        self.trained: dict[str, nn.Parameter] = {}
        self.batch: dict[str, torch.Tensor] = {}
        # The backward pass to capture, if it is not ``loss.backward()``.
        self.add_gradients: Callable[[torch.Tensor], None] | None = None
        # Formed weights, if used.
        self.formed: Formed | None = None
        self.zero, self.update = MAKERS[name](self)
        self.graphs = "off" if name == "baseline" else options.cuda_graphs
        # Filled packing, as the loop uses with formed weights; for the frozen model too.
        formed = ADAPTER_PRODUCTS == "formed" or obstacle_to(device, DTYPES[options.precision]) is None
        self.filled = name != "baseline" and formed
        self.compiled = name != "baseline" and wants_compile(options.compile, device, STEPS)
        if self.compiled and self.filled:
            compile_blocks(self.base.dit, "inductor")
        elif self.compiled:
            compile_elementwise(self.base.dit)
        # Replays forward and backward as one graph; set by ``record``.
        self.replay: Callable[[], tuple[torch.Tensor, ...]] | None = None
        self.recorder: Recorder | None = None
        # By shape: the tensors a graph reads, and its replay.
        self.recorded: dict[tuple, tuple[list[torch.Tensor], Callable]] = {}

    def use(self, clips: int, frames: int, longest: int | None = None) -> None:
        """Set the batch; equal sizes give equal values.

        longest   frames of the run's longest clip; None: ``frames``
        """
        self.replay = None
        self.batch = make_batch(self.base, clips, frames)
        self.packing = None
        if self.filled:
            self._fill(clips, frames, longest or frames)
        if self.skips_redundant and not self.filled:
            # Before the step, as in our loader: finding the longest prompt would sync with the device.
            cut = without_common_padding(self.batch["prompt"], self.batch["prompt_mask"])
            self.batch["prompt"], self.batch["prompt_mask"] = cut
        self.has_context = bool(self.batch["inpaint_mask"].any())
        if not self.trained:
            for name in INPUTS:
                self.batch[name].requires_grad_()
        elif self._shape() in self.recorded:
            own, self.replay = self.recorded[self._shape()]
            for target, value in zip(own, self._tensors(), strict=True):
                target.copy_(value)

    def _tensors(self) -> list[torch.Tensor]:
        """All tensors of a batch that a pass reads."""
        filled = [self.packing.table_5K, self.packing.start_S, self.keep] if self.filled else []
        return [*self.batch.values(), *filled]

    def _shape(self) -> tuple:
        return tuple(value.shape for value in self._tensors())

    def _fill(self, clips: int, frames: int, longest: int) -> None:
        """As ``ShapeLadder`` does."""
        memory, behind = self.base.dit.transformer.memory, (0, longest - frames)
        most = memory + longest
        tokens = min(rung(clips * (memory + frames), most), clips * most)
        self.packing = FilledPacking.of((frames,) * clips, memory, longest, tokens).to(self.device)
        for name in ("latents", "noised", "target", "inpaint_mask"):
            self.batch[name] = F.pad(self.batch[name], behind)
        self.keep = torch.arange(longest, device=self.device).expand(clips, longest) < frames

    def record(self) -> None:
        """Capture this batch's forward and backward as a graph, if a run would, and replay it from now on."""
        if self.replay is None and wants_graphs(self.graphs, self.device, STEPS):
            # One recorder for all lengths: its graphs share a memory pool.
            recorder = self.recorder = self.recorder or Recorder(self.device)
            passes = functools.partial(self.passes, self.add_gradients)
            recorder.warm_up(passes)
            self.zero()
            try:
                self.replay = recorder.record(passes)
                self.recorded[self._shape()] = self._tensors(), self.replay
            except RuntimeError as problem:
                # Continue without, as a run would; the row says "graphed": false.
                print(f"no CUDA graph: {problem}", file=sys.stderr)

    def step(self) -> torch.Tensor:
        """Forward, loss, backward and, if something is trained, the optimiser's step. Returns the loss."""
        self.zero()
        (loss,) = self.replay() if self.replay else self.passes()
        self.update()
        return loss

    def passes(self, backward: Callable[[torch.Tensor], None] | None = None) -> tuple[torch.Tensor]:
        """Forward, loss, backward; the loss."""
        batch = self.batch
        context = {"inpaint_mask_B1T": batch["inpaint_mask"], "inpaint_latents_BDT": batch["latents"]}
        if self.skips_redundant and not self.has_context:
            context = {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            velocity = self.base.velocity(
                batch["noised"],
                batch["t"],
                batch["prompt"],
                batch["prompt_mask"],
                batch["seconds"],
                prompt_length=self.base.prompt_tokens,
                packing=self.packing,
                **context,
            )
        keep = self.keep if self.filled else torch.ones_like(batch["inpaint_mask"][:, 0], dtype=torch.bool)
        loss, _, _ = flow.masked_loss(velocity, batch["target"], keep, batch["inpaint_mask"])
        (backward or torch.Tensor.backward)(loss)
        return (loss.detach(),)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Copies of the trained tensors' gradients after a step."""
        return {name: parameter.grad.clone() for name, parameter in self.trained.items()}


def _ours(side: Side) -> tuple[Callable, Callable]:
    side.trained = adapters.adapter_parameters(side.base)
    flat = FlatAdapters(side.trained, LEARNING_RATE, WEIGHT_DECAY, scalars=0)
    side.add_gradients = flat.add_gradients
    products = types.SimpleNamespace(
        adapter_products=ADAPTER_PRODUCTS, mixed_precision="bf16" if side.autocast else "no"
    )
    formed = use_formed_weights(side.base, flat, products, side.device)
    if formed is None:
        return flat.zero, flat.step

    def begin() -> None:
        flat.zero()
        formed.form()

    def end() -> None:
        formed.finish()
        flat.step()

    side.formed = formed
    return begin, end


def _baseline(side: Side) -> tuple[Callable, Callable]:
    side.trained = materialise(side.base)
    optimizer = torch.optim.AdamW(
        side.trained.values(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY
    )
    return optimizer.zero_grad, optimizer.step


def _frozen(side: Side) -> tuple[Callable, Callable]:
    """The base without adapter, with gradients to its inputs."""
    if product_dtype(side.base.dtype, side.device) == side.base.dtype:
        adapters.detach_adapter(side.base)
    else:
        # On this CPU plain layers would emulate their products; adapted layers at strength 0 do not.
        adapters.set_strength(side.base, 0)

    def zero() -> None:
        # In place: a graph writes to the tensors it was captured with.
        for value in side.batch.values():
            if value.grad is not None:
                value.grad.zero_()

    return zero, lambda: None


MAKERS = {"ours": _ours, "baseline": _baseline, "frozen": _frozen}


def make_batch(base: Base, clips: int, frames: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (clips, base.latent_channels, frames)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    t = flow.sample_timesteps(clips, generator)
    noised, target = flow.noise_latents(latents, noise, t)
    tokens, width = base.config.prompt.max_length, base.config.cond_dim
    batch = {
        "latents": latents,
        "noised": noised,
        "target": target,
        "t": t,
        "prompt": torch.randn(clips, tokens, width, generator=generator),
        "prompt_mask": torch.arange(tokens).expand(clips, tokens) < 20,
        "seconds": torch.full((clips,), 30.0),
        # No given context, as in four of five training samples.
        "inpaint_mask": torch.zeros(clips, 1, frames),
    }
    return {name: value.to(base.device) for name, value in batch.items()}
