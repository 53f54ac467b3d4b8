"""What one micro batch computes, counted from shapes: floating point operations, bytes moved, values kept.

The count walks the network as its forward pass does and notes which inputs need a gradient: nothing before the first
adapted layer does. Two numbers per multiply-add, as everywhere; bytes are those of operands and results that pass
through memory once per operation.

Legend: E width, P members of a differential pair (1 or 2), N tokens of all clips (frames and memory tokens),
S context tokens, R rank, m fan_out, n fan_in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from sa3dist_kernels.adapter_types import AdapterType
from sa3dist_kernels.factored_linear import cross_from_product

from sa3dist.model.conditioners import HIDDEN_WIDTH
from sa3dist.model.config import ModelConfig
from sa3dist.model.frequencies import FEATURES

# Passes over memory, in values of one width per token and block, of what is not a product: forward, backward. Of norms,
# modulation, gates and residual sums; of q and k norms with rotary, per projected width; of SwiGLU, per inner width.
STREAM_PASSES, HEAD_PASSES, GATE_PASSES = (19, 30), (6, 10), (5, 8)
# A fused attention kernel keeps no scores: its backward pass makes them again, five products instead of four.
ATTENTION_BACKWARD = 2.5
# Parts of the names of layers with a bias.
BIASED = (".ff.ff.", ".to_local_embed.", ".to_timestep_embed.", ".global_cond_embedder.", "conditioners.")


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What is fed to the network: valid frames of every clip, and what comes with them.

    context_tokens   per clip, the seconds token included; prompt padding counts once where it is evaluated once
    attended_tokens  per clip, what cross-attention reads: all of them
    given_context    whether some inpainting context is given, so that every frame is conditioned by its own
    """

    lengths: tuple[int, ...]
    context_tokens: int
    attended_tokens: int
    given_context: bool = False


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Which layers are adapted, and how; names are relative as in a file. An empty one is the frozen base.

    formed   they multiply with W' formed once per step: a layer keeps its input and, where rows are scaled, its output
             without the bias
    """

    kind: AdapterType | None
    rank: int
    layers: frozenset[str]
    formed: bool = False


@dataclasses.dataclass
class Work:
    """What one direction does: (floating point operations, bytes moved) of every operation."""

    operations: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def do(self, flops: float, moved: float) -> None:
        self.operations.append((flops, moved))

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.operations)

    @property
    def bytes(self) -> float:
        return sum(moved for _, moved in self.operations)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> tuple[float, float]:
        """Shortest time on such a device, split: operations it multiplies for, and those it waits for memory in."""
        computing = moving = 0.0
        for flops, moved in self.operations:
            compute, memory = flops / flops_per_second, moved / bytes_per_second
            computing += compute if compute >= memory else 0
            moving += memory if memory > compute else 0
        return computing, moving


@dataclasses.dataclass
class Part:
    """One piece of the network: its forward and backward work, and bytes it keeps for the backward pass.

    norm_bytes   those of them that hold norms and gains shared over the step: recomputing does not save them
    """

    forward: Work = dataclasses.field(default_factory=Work)
    backward: Work = dataclasses.field(default_factory=Work)
    kept_bytes: float = 0.0
    input_bytes: float = 0.0
    norm_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Count:
    """One micro batch without recomputation: the blocks, one like the other, and everything around them.

    blocks   may differ in that the first ones need no gradients where they are not adapted
    """

    ends: Part
    blocks: tuple[Part, ...]

    def total(self, recomputed_blocks: int = 0) -> Work:
        """Forward, backward, and the forward of the first ``recomputed_blocks`` blocks once more."""
        total = Work()
        for i, part in enumerate((self.ends, *self.blocks)):
            total.operations += part.forward.operations * (2 if 0 < i <= recomputed_blocks else 1)
            total.operations += part.backward.operations
        return total

    def kept_bytes(self, recomputed_blocks: int = 0) -> float:
        """What waits for the backward pass at its start, with the working set of one block that is computed again."""
        kept = self.ends.kept_bytes + sum(part.kept_bytes for part in self.blocks[recomputed_blocks:])
        first = self.blocks[:recomputed_blocks]
        kept += sum(part.input_bytes + part.norm_bytes for part in first)
        return kept + max((part.kept_bytes - part.norm_bytes for part in first), default=0.0)


def count(
    config: ModelConfig,
    batch: MicroBatch,
    adapter: Adapter,
    value_bytes: int,
    weight_bytes: int,
    inputs_learn: bool = False,
) -> Count:
    """Work and kept bytes of one micro batch, forward and backward.

    value_bytes, weight_bytes   of an activation and of a frozen weight's entry
    inputs_learn                gradients reach latents, prompt, time and seconds: what a frozen model is timed with
    """
    return _Walk(config, batch, adapter, value_bytes, weight_bytes).run(inputs_learn)


class _Walk:
    def __init__(self, config: ModelConfig, batch: MicroBatch, adapter: Adapter, value_bytes: int, weight_bytes: int):
        self.config, self.dit, self.batch, self.adapter = config, config.dit, batch, adapter
        self.value_bytes, self.weight_bytes = value_bytes, weight_bytes
        self.pairs = 2 if self.dit.attn_kwargs.differential else 1
        self.frames = sum(batch.lengths)
        self.clips = len(batch.lengths)
        self.tokens = self.frames + self.clips * self.dit.num_memory_tokens
        self.part = Part()

    def run(self, given: bool) -> Count:
        dit, width, clips = self.dit, self.dit.embed_dim, self.clips
        ends = self.part
        context = clips * self.batch.context_tokens
        seconds = self.linear(
            "conditioners.seconds_total.embedder.embedding.1", clips, self.config.cond_dim, FEATURES, given
        )
        prompt = given
        if self.config.prompt.project_out or self.config.cond_dim != HIDDEN_WIDTH:
            rows = clips * (self.batch.context_tokens - 1)
            prompt = self.linear("conditioners.prompt.proj_out", rows, self.config.cond_dim, HIDDEN_WIDTH, given)
        text = self.two_layers("model.to_cond_embed", context, width, dit.cond_token_dim, seconds or prompt)
        embed = self.two_layers("model.to_global_embed", clips, width, dit.global_cond_dim, seconds)
        time = self.two_layers("model.to_timestep_embed", clips, width, FEATURES, given)
        name = "model.transformer.global_cond_embedder"
        embed = self.linear(f"{name}.0", clips, width, width, embed or time)
        modulated = self.linear(f"{name}.2", clips, 6 * width, width, embed)
        x = self.linear("model.preprocess_conv", self.frames, dit.io_channels, dit.io_channels, given)
        x = self.linear("model.transformer.project_in", self.frames, width, dit.io_channels, x)
        blocks = []
        for i in range(dit.depth):
            self.part = Part(input_bytes=self.tokens * width * self.value_bytes)
            x = self.block(f"model.transformer.layers.{i}", x, text, modulated)
            blocks.append(self.part)
        self.part = ends
        x = self.linear("model.transformer.project_out", self.frames, dit.io_channels, width, x)
        x = self.linear("model.postprocess_conv", self.frames, dit.io_channels, dit.io_channels, x)
        self.keep(self.tokens, 2, x)
        self.keep(context, 4, text)
        # Outputs that nobody else keeps, here of project_in and to_cond_embed.
        self.keep(self.frames + context, 1, self.adapter.formed and self.adapter.kind.rows)
        return Count(ends, tuple(blocks))

    def two_layers(self, name: str, rows: int, width: int, fan_in: int, needs: bool) -> bool:
        needs = self.linear(f"{name}.0", rows, width, fan_in, needs)
        return self.linear(f"{name}.2", rows, width, width, needs)

    def block(self, name: str, x: bool, text: bool, modulated: bool) -> bool:
        """One block; each flag says whether a gradient flows through that input. Returns the output's."""
        width, pairs, tokens = self.dit.embed_dim, self.pairs, self.tokens
        qkv = self.linear(f"{name}.self_attn.to_qkv", tokens, (2 * pairs + 1) * width, width, x or modulated)
        self.attention([(n, n) for n in self.spans()], qkv)
        self.keep(tokens, (2 * pairs + 1) + 3 * pairs + (3 if pairs == 2 else 0) + 4, qkv)
        x = self.linear(f"{name}.self_attn.to_out", tokens, width, width, qkv) or x or modulated

        context = self.clips * self.batch.context_tokens
        q = self.linear(f"{name}.cross_attn.to_q", tokens, pairs * width, width, x)
        kv = self.linear(f"{name}.cross_attn.to_kv", context, (pairs + 1) * width, width, text)
        self.attention([(n, self.batch.attended_tokens) for n in self.spans()], q or kv)
        self.keep(tokens, 2 + 3 * pairs + (1 if pairs == 2 else 0), q or kv)
        attended = self.clips * self.batch.attended_tokens
        self.keep(attended, (pairs + 1) + pairs + (2 if pairs == 2 else 0), q or kv)
        x = self.linear(f"{name}.cross_attn.to_out", tokens, width, width, q or kv) or x
        # The one output of a block that nobody else keeps.
        self.keep(tokens, 1, self.adapter.formed and self.adapter.kind.rows)

        if self.dit.local_add_cond_dim is not None:
            rows = self.frames if self.batch.given_context else 1
            local = self.two_layers(f"{name}.to_local_embed", rows, width, self.dit.local_add_cond_dim, False)
            self.keep(rows, 2, local)
            x = x or local
        inner = int(width * self.dit.ff_kwargs.mult)
        hidden = self.linear(f"{name}.ff.ff.0.proj", tokens, 2 * inner, width, x or modulated)
        self.keep(tokens, 4 + 4 * inner / width, hidden)
        self.passes(hidden)
        return self.linear(f"{name}.ff.ff.2", tokens, width, inner, hidden) or x

    def spans(self) -> list[int]:
        return [length + self.dit.num_memory_tokens for length in self.batch.lengths]

    def linear(self, name: str, rows: int, fan_out: int, fan_in: int, needs: bool) -> bool:
        """A frozen or adapted layer over ``rows`` inputs that need a gradient or not. Returns whether outputs do."""
        kind = self.adapter.kind if name in self.adapter.layers else None
        weight = fan_out * fan_in
        moved = rows * (fan_out + fan_in) * self.value_bytes + weight * self.weight_bytes
        self.part.forward.do(2 * rows * weight, moved)
        if needs or (kind and kind.cols):
            self.part.backward.do(2 * rows * weight, moved)
        if kind is None:
            return needs
        self.adapter_of(kind, rows, fan_out, fan_in, needs)
        if self.adapter.formed and kind.rows and any(part in name for part in BIASED):
            # Elsewhere it is the output, which the next operation keeps.
            self.part.kept_bytes += rows * fan_out * self.value_bytes
        return True

    def adapter_of(self, kind: AdapterType, rows: int, fan_out: int, fan_in: int, needs: bool) -> None:
        """What an adapted layer does beyond the frozen one: the branch, the passes over the weight, the scalings."""
        rank, weight, value = self.adapter.rank, fan_out * fan_in, self.value_bytes
        forward, backward = self.part.forward, self.part.backward
        through_one, through_other = (2 * rows * rank * fan for fan in (fan_out, fan_in))
        thin = [(rows * (fan + rank)) * value for fan in (fan_out, fan_in)]
        forward.do(through_one, thin[0])
        forward.do(through_other, thin[1])
        # Gradients of the branch's middle and of the right factor; of the input; of the left factor where it learns.
        backward.do(through_one, thin[0])
        backward.do(through_other, thin[1])
        if needs or kind.cols:
            backward.do(through_other, thin[1])
        if not kind.xs:
            backward.do(through_one, thin[0])
        # Rows ride along with the main product; columns read the weight once more for every pass.
        read = weight * self.weight_bytes if kind.cols else 0
        for direction, passes in zip((forward, backward), weight_passes(kind), strict=True):
            for _ in range(passes):
                direction.do(2 * rank * weight, read)
        kept, norms = rows * rank * value, 0
        if kind.rows:
            forward.do(0, 2 * rows * fan_out * value)
            backward.do(0, 4 * rows * fan_out * value)
            # The product before its scaling.
            kept += rows * fan_out * value
            # Gain, norms and W0 R^T in float32.
            norms += 4 * fan_out * (rank + 2)
        if kind.cols:
            forward.do(0, 2 * rows * fan_in * value)
            backward.do(0, 4 * rows * fan_in * value)
            norms += 4 * (fan_in * (rank + 2) + (fan_out * rank if kind.rows else 0))
        if self.adapter.formed:
            # What formed weights hold they hold for the whole run.
            return
        self.part.kept_bytes += kept + norms
        if not cross_from_product(kind):
            self.part.norm_bytes += norms

    def attention(self, sizes: Iterable[tuple[int, int]], needs: bool) -> None:
        """Fused attention of all heads: (queries, keys) of every clip."""
        width, pairs = self.dit.embed_dim, self.pairs
        for queries, keys in sizes:
            flops = 4 * pairs * width * queries * keys
            moved = (2 * queries + 2 * keys) * pairs * width * self.value_bytes
            self.part.forward.do(flops, moved)
            if needs:
                self.part.backward.do(ATTENTION_BACKWARD * flops, 2 * moved)

    def passes(self, needs: bool) -> None:
        """Everything that is no product: norms, rotary, gates, sums."""
        heads = 3 * self.pairs + 1
        per_width = [
            stream + heads * head + gate * self.dit.ff_kwargs.mult
            for stream, head, gate in zip(STREAM_PASSES, HEAD_PASSES, GATE_PASSES, strict=True)
        ]
        moved = self.tokens * self.dit.embed_dim * self.value_bytes
        self.part.forward.do(0, per_width[0] * moved)
        if needs:
            self.part.backward.do(0, per_width[1] * moved)

    def keep(self, rows: int, widths: float, needs: bool) -> None:
        """Values that wait for the backward pass, in widths per row; counted from what autograd saves of each block."""
        if needs:
            self.part.kept_bytes += rows * widths * self.dit.embed_dim * self.value_bytes


def weight_passes(kind: AdapterType) -> tuple[int, int]:
    """Thin products of rank R with the whole weight, forward and backward: what the norms of W0 + s L R need."""
    if kind.xs:
        return (1, 1) if kind.rows and kind.cols else (0, 0)
    return {(False, False): (0, 0), (True, False): (1, 1), (False, True): (1, 1), (True, True): (2, 2)}[
        kind.rows, kind.cols
    ]
