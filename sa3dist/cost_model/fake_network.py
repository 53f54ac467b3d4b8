"""What one micro batch computes, and keeps for the backward pass, counted on the network itself.

The network runs forward and backward on fake tensors, which have shapes but no values: no weight is loaded, no product
computed. Of blocks with equal adapters one runs and stands for all. The fake tensors are on a CPU: an uncompiled pass
on a GPU keeps somewhat less, because its 16-bit norms are one operation.
"""

import dataclasses

import torch
from sa3dist_kernels import FormedLayer, frozen_constants
from sa3dist_kernels.adapter_types import AdapterType
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sa3dist.adapters import adapted_layers, candidate_layers
from sa3dist.adapters.attach import replace_layer
from sa3dist.adapters.layers import AdaptedLayer, AdapterTensors
from sa3dist.cost_model.flops import Count, Counter
from sa3dist.model.base import Base
from sa3dist.model.conditioners import HIDDEN_WIDTH
from sa3dist.model.config import ModelConfig
from sa3dist.model.frequencies import expo_frequencies
from sa3dist.model.packing import FilledPacking, Packing

BLOCKS = "model.transformer.layers."
# Layers on tokens before the first block, and behind the last; all others outside of blocks work on conditioning.
BEFORE_BLOCKS = {"model.preprocess_conv", "model.transformer.project_in"}
BEHIND_BLOCKS = {"model.transformer.project_out", "model.postprocess_conv"}


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """A micro batch of clips of one length, in latent frames; prompts have their full length.

    given_context   whether inpainting context is given, so that each frame has its own conditioning
    """

    clips: int
    frames: int
    given_context: bool = False


@dataclasses.dataclass(frozen=True)
class AdapterShape:
    """Which layers are adapted, and how; names as in a file. Without any, the base is frozen.

    formed   they multiply with W' formed once per step
    """

    kind: AdapterType
    rank: int
    layers: frozenset[str]
    formed: bool = False


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Dtype of the frozen base, whether autocast to bfloat16 is on, and whether whole blocks are compiled.

    A compiled block keeps its input and the inputs and outputs of products and attention; the compiler recomputes
    everything between these in the backward pass.
    """

    base: torch.dtype
    autocast: bool = False
    compiled: bool = False


class FakeNetwork:
    """The network with its adapters, as fake tensors; it holds one block of each kind."""

    def __init__(self, config: ModelConfig, adapter: AdapterShape, numerics: Numerics) -> None:
        self.adapter, self.numerics = adapter, numerics
        # Cached for the whole process: make the real one first, so that later passes do not find a fake one.
        expo_frequencies(torch.device("cpu"))
        self._which, blocks = _alike(config.dit.depth, adapter.layers)
        config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, depth=len(blocks)))
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self._base = Base(config, _NoValues(), "cpu", numerics.base, text_source=None, encoder=False)
            for name, layer in candidate_layers(self._base.adapter_roots).items():
                if _full_name(name, blocks) in adapter.layers:
                    replace_layer(self._base, name, _adapted(layer, adapter, numerics))
        sums = [layer.sums for layer in adapted_layers(self._base).values()]
        self._trained = [
            value for value in (*self._base.parameters(), *sums) if value is not None and value.requires_grad
        ]

    def count(self, batch: BatchShape, backward: bool = True) -> Count:
        """Work and kept bytes of one micro batch.

        backward   False skips the work of the backward pass, which takes most of the counting time
        """
        counter = Counter(self._base, self.numerics.compiled)
        with self._mode, counter:
            with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda tensor: tensor):
                velocity = self._velocity(batch)
            counter.settle_kept()
            if backward and self._trained:
                counter.backwards = True
                torch.autograd.grad(velocity, self._trained, velocity.detach(), allow_unused=True)
        blocks = tuple(counter.parts[kind] for kind in self._which)
        return Count(counter.parts[None], blocks, counter.input_bytes)

    def _velocity(self, batch: BatchShape) -> Tensor:
        base, clips, frames = self._base, batch.clips, batch.frames
        if self.adapter.formed:
            # As on the ladder's top rung, which needs no filling.
            table = torch.empty(5, clips * (base.config.dit.num_memory_tokens + frames), dtype=torch.int64)
            packing = FilledPacking(table, torch.empty(clips + 1, dtype=torch.int32))
        else:
            packing = Packing(frames, (frames,) * clips, torch.empty(clips * frames, dtype=torch.int64))
        latents, number, context = torch.empty(clips, base.latent_channels, frames), torch.empty(clips), {}
        if batch.given_context and base.config.dit.local_add_cond_dim is not None:
            context = {"inpaint_mask_B1T": torch.empty(clips, 1, frames), "inpaint_latents_BDT": latents}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.numerics.autocast):
            mask = torch.empty(clips, base.prompt_tokens)
            embeds = base.embed_prompts(torch.empty(*mask.shape, HIDDEN_WIDTH), mask)
            return base.velocity(latents, number, embeds, mask, number, packing=packing, **context)


def _alike(depth: int, adapted: frozenset[str]) -> tuple[list[int], list[int]]:
    """For every block the number of its kind, and for every kind its first block.

    Blocks are of one kind when the same layers are adapted and gradients do or do not flow back to their input.
    """
    outside = {name for name in adapted if not name.startswith(BLOCKS)}
    flows = bool(outside & BEFORE_BLOCKS)
    through_conditioning = bool(outside - BEFORE_BLOCKS - BEHIND_BLOCKS)
    kinds, which, first = {}, [], []
    for block in range(depth):
        prefix = f"{BLOCKS}{block}."
        own = frozenset(name.removeprefix(prefix) for name in adapted if name.startswith(prefix))
        kind = kinds.setdefault((own, flows), len(kinds))
        if kind == len(first):
            first.append(block)
        which.append(kind)
        flows = flows or through_conditioning or bool(own)
    return which, first


class _NoValues:
    """Weights of any name, without values, read like a checkpoint file's."""

    def read(self, name: str, shape: tuple[int, ...], device, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)


def _full_name(name: str, blocks: list[int]) -> str:
    """The whole network's name of a layer in the one that has only ``blocks``."""
    if not name.startswith(BLOCKS):
        return name
    number, _, rest = name.removeprefix(BLOCKS).partition(".")
    return f"{BLOCKS}{blocks[int(number)]}.{rest}"


def _adapted(layer: torch.nn.Module, adapter: AdapterShape, numerics: Numerics) -> AdaptedLayer:
    weight_OI, rank = layer.weight.detach().flatten(1), adapter.rank
    fan_out, fan_in = weight_OI.shape
    bases = (torch.empty(fan_out, rank), torch.empty(fan_in, rank)) if adapter.kind.xs else ()
    trained = {name: torch.empty(shape) for name, shape in adapter.kind.parameter_shapes(fan_out, fan_in, rank).items()}
    made = AdaptedLayer(layer, adapter.kind, AdapterTensors(trained, frozen_constants(weight_OI, *bases)), scale=1.0)
    if adapter.formed:
        products = torch.bfloat16 if numerics.autocast else numerics.base
        shapes = (fan_out, fan_in), (fan_out, rank), (rank, fan_in)
        made.formed = FormedLayer(*(torch.empty(shape, dtype=products) for shape in shapes))
        made.sums = torch.empty(sum(value.numel() for value in trained.values()), requires_grad=True)
    return made
