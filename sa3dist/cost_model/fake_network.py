"""Counts what one micro batch computes and saves for the backward pass, by running the network on fake tensors.

Fake tensors have shapes but no values, so no weight is loaded and nothing is multiplied. Blocks that are adapted alike
are run once. The fake tensors are CPU tensors: an uncompiled pass on a GPU saves slightly less, because 16-bit norms
are one operation there.
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
# Layers of the token path before the first block and after the last one. All others process conditioning.
BEFORE_BLOCKS = {"model.preprocess_conv", "model.transformer.project_in"}
AFTER_BLOCKS = {"model.transformer.project_out", "model.postprocess_conv"}


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """A micro batch of clips of one length, in latent frames, with prompts of full length.

    given_context   whether there is inpainting context, so that each frame has its own conditioning
    """

    clips: int
    frames: int
    given_context: bool = False


@dataclasses.dataclass(frozen=True)
class AdapterShape:
    """Which layers are adapted, and how. Names are relative as in a file; without layers the base is frozen.

    formed   whether layers multiply with a formed W'
    """

    kind: AdapterType
    rank: int
    layers: frozenset[str]
    formed: bool = False


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The frozen base's dtype, whether autocast to bfloat16 is on, and whether whole blocks are compiled.

    A compiled block saves its input and the operands and results of products and attention; its backward pass
    recomputes everything else.
    """

    base: torch.dtype
    autocast: bool = False
    compiled: bool = False


class FakeNetwork:
    """The network with its adapters as fake tensors, with one block for all that are alike."""

    def __init__(self, config: ModelConfig, adapter: AdapterShape, numerics: Numerics) -> None:
        self.adapter, self.numerics = adapter, numerics
        # Fill this process-wide cache with a real tensor first, not a fake one.
        expo_frequencies(torch.device("cpu"))
        self._kind_of_block, blocks = _alike(config.dit.depth, adapter.layers)
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
        """Work and saved bytes of one micro batch.

        backward   False skips the work of the backward pass, which takes most of the counting time
        """
        counter = Counter(self._base, self.numerics.compiled)
        with self._mode, counter:
            with torch.autograd.graph.saved_tensors_hooks(counter.on_save, lambda tensor: tensor):
                velocity = self._velocity(batch)
            counter.assign_saved_bytes()
            if backward and self._trained:
                counter.in_backward = True
                torch.autograd.grad(velocity, self._trained, velocity.detach(), allow_unused=True)
        blocks = tuple(counter.parts[kind] for kind in self._kind_of_block)
        return Count(counter.parts[None], blocks, counter.input_bytes)

    def _velocity(self, batch: BatchShape) -> Tensor:
        base, clips, frames = self._base, batch.clips, batch.frames
        if self.adapter.formed:
            # The largest size of the ladder, which needs no filling.
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
    """The kind of each block, and the first block of each kind.

    Blocks are alike if the same layers are adapted and their inputs both do or both do not need a gradient.
    """
    outside = {name for name in adapted if not name.startswith(BLOCKS)}
    flows = bool(outside & BEFORE_BLOCKS)
    through_conditioning = bool(outside - BEFORE_BLOCKS - AFTER_BLOCKS)
    kinds, kind_of_block, first = {}, [], []
    for block in range(depth):
        prefix = f"{BLOCKS}{block}."
        own = frozenset(name.removeprefix(prefix) for name in adapted if name.startswith(prefix))
        kind = kinds.setdefault((own, flows), len(kinds))
        if kind == len(first):
            first.append(block)
        kind_of_block.append(kind)
        flows = flows or through_conditioning or bool(own)
    return kind_of_block, first


class _NoValues:
    """Uninitialised weights under any name, read like a checkpoint file."""

    def read(self, name: str, shape: tuple[int, ...], device, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)


def _full_name(name: str, blocks: list[int]) -> str:
    """The full network's name of a layer of the reduced one, which has only ``blocks``."""
    if not name.startswith(BLOCKS):
        return name
    number, _, rest = name.removeprefix(BLOCKS).partition(".")
    return f"{BLOCKS}{blocks[int(number)]}.{rest}"


def _adapted(layer: torch.nn.Module, adapter: AdapterShape, numerics: Numerics) -> AdaptedLayer:
    weight_OI, rank = layer.weight.detach().flatten(1), adapter.rank
    fan_out, fan_in = weight_OI.shape
    bases = (torch.empty(fan_out, rank), torch.empty(fan_in, rank)) if adapter.kind.xs else ()
    trained = {name: torch.empty(shape) for name, shape in adapter.kind.parameter_shapes(fan_out, fan_in, rank).items()}
    adapted = AdaptedLayer(layer, adapter.kind, AdapterTensors(trained, frozen_constants(weight_OI, *bases)), scale=1.0)
    if adapter.formed:
        products = torch.bfloat16 if numerics.autocast else numerics.base
        shapes = (fan_out, fan_in), (fan_out, rank), (rank, fan_in)
        adapted.formed = FormedLayer(*(torch.empty(shape, dtype=products) for shape in shapes))
        adapted.sums = torch.empty(sum(value.numel() for value in trained.values()), requires_grad=True)
    return adapted
