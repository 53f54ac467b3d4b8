"""The diffusion transformer: noisy latents and conditioning in, velocity out.

Legend: B batch, C latent channels, T latent frames, M memory tokens, S context tokens, E width. Tokens are (G, N, E):
padded, G = B and N = M + T; packed, G = 1 and N is the number of all clips' tokens (``token_layout.py``).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sa3dist.model.blocks import (
    CrossAttention,
    DyT,
    FeedForward,
    RMSNorm,
    RotaryEmbedding,
    SelfAttention,
    expo_features,
)
from sa3dist.model.config import DiTConfig
from sa3dist.model.frequencies import FEATURES
from sa3dist.model.kernel_trial import gate_kernel_works
from sa3dist.model.packing import FilledPacking, Packing
from sa3dist.model.self_attention import kernel_works
from sa3dist.model.token_layout import Filled, Packed, Padded

# Whether ``Filled`` layouts use the fused gradient of the feed-forward's gate; other layouts leave it to autograd.
FUSED_GATE = True


class Shared(NamedTuple):
    """Inputs that all layers of a forward pass share.

    context_BSE  tokens for cross-attention; repeated: the one that stands for several, see ``CrossAttention``
    local_GTC    local conditioning, where one frame may stand for all, or None
    rotary       cosines, signed sines, half the number of rotated channels
    layout       which token belongs to which clip
    """

    context_BSE: Tensor
    repeated: tuple[int, int] | None
    local_GTC: Tensor | None
    rotary: tuple[Tensor, Tensor, int]
    layout: Padded | Packed | Filled


def two_layers(inner: int, outer: int, bias: bool) -> nn.Sequential:
    """Linear, SiLU, Linear: the form of every conditioning embedder."""
    return nn.Sequential(nn.Linear(inner, outer, bias=bias), nn.SiLU(), nn.Linear(outer, outer, bias=bias))


def make_block_norm(config: DiTConfig) -> nn.Module:
    if config.norm_type == "dyt":
        return DyT(config.embed_dim)
    return RMSNorm(config.embed_dim, config.norm_kwargs.eps, config.norm_kwargs.force_fp32)


def modulated_norm(norm: nn.Module, h_GNE: Tensor, scale_BE: Tensor, shift_BE: Tensor, layout) -> Tensor:
    return layout.modulate(norm(h_GNE), scale_BE, shift_BE)


def add_gated(h_GNE: Tensor, gate_BE: Tensor, branch_GNE: Tensor, layout) -> Tensor:
    return layout.add_gated(h_GNE, gate_BE, branch_GNE.to(h_GNE.dtype))


class Block(nn.Module):
    """One layer: modulated self-attention, cross-attention, local conditioning, modulated feed-forward."""

    # ``compile_elementwise`` may replace these by compiled ones.
    modulated_norm = staticmethod(modulated_norm)
    add_gated = staticmethod(add_gated)

    def __init__(self, config: DiTConfig):
        super().__init__()
        width, attn = config.embed_dim, config.attn_kwargs
        heads = (config.head_dim, attn.differential, attn.qk_norm, attn.qk_norm_eps)
        self.pre_norm = make_block_norm(config)
        self.self_attn = SelfAttention(width, *heads)
        self.cross_attend_norm = make_block_norm(config)
        self.cross_attn = CrossAttention(width, *heads)
        self.ff_norm = make_block_norm(config)
        self.ff = FeedForward(width, config.ff_kwargs.mult, config.ff_kwargs.sinusoidal)
        self.to_scale_shift_gate = nn.Parameter(torch.zeros(6 * width))
        if config.local_add_cond_dim is not None:
            self.to_local_embed = two_layers(config.local_add_cond_dim, width, bias=True)

    def forward(self, h_GNE: Tensor, modulation: tuple[Tensor, ...], shared: Shared) -> Tensor:
        """modulation: 1 + scale, shift, gate of the attention, then of the feed-forward, each (B, E)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation
        layout = shared.layout
        if layout.attends:
            normed = self.modulated_norm(self.pre_norm, h_GNE, scale1, shift1, layout)
            branch = self.self_attn(normed, shared.rotary, layout.attend_pairs, layout.attend_qkv)
            h_GNE = self.add_gated(h_GNE, gate1, branch, layout)
        context = shared.context_BSE, shared.repeated
        branch = self.cross_attn(self.cross_attend_norm(h_GNE), *context, layout.attend_pairs_to_context)
        h_GNE = h_GNE + branch.to(h_GNE.dtype)
        if shared.local_GTC is not None:
            h_GNE = layout.add_to_frames(h_GNE, self.to_local_embed(shared.local_GTC).to(h_GNE.dtype))
        if layout.attends:
            normed = self.modulated_norm(self.ff_norm, h_GNE, scale2, shift2, layout)
            branch = self.ff(normed, layout.fused_gate)
            h_GNE = self.add_gated(h_GNE, gate2, branch, layout)
        return h_GNE


class Transformer(nn.Module):
    """Memory tokens, rotary positions and blocks, between the two channel projections."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width, channels = config.embed_dim, config.io_channels
        self.head_dim = config.head_dim
        # How many blocks the backward pass recomputes: the first, which it reaches when others' tensors are free again.
        self.recomputed_blocks = 0
        self.project_in = nn.Linear(channels, width, bias=False)
        self.project_out = nn.Linear(width, channels, bias=False)
        self.memory = config.num_memory_tokens
        if self.memory:
            self.memory_tokens = nn.Parameter(torch.zeros(self.memory, width))
        self.rotary_pos_emb = RotaryEmbedding(max(config.head_dim // 2, 32))
        self.global_cond_embedder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        # ``compile_blocks`` may replace this by a compiled one.
        self.run_block = Block.forward
        # Set if weights are formed per use: called with a block's index before each pass of the block.
        self.form_block: Callable[[int], None] | None = None
        # Overrides how the block of an index is run: called like ``checkpoint``, with a function and its arguments.
        self.block_runners: dict[int, Callable[..., Tensor]] = {}

    def forward(
        self,
        x_GTC: Tensor,
        context: tuple[Tensor, tuple[int, int] | None],
        global_BE: Tensor,
        local_GTC: Tensor | None,
        layout: Padded | Packed | Filled,
        dtype: torch.dtype,
        rounding: torch.dtype | None,
    ) -> Tensor:
        h_GNE = self.project_in(x_GTC).to(dtype)
        if layout.memory:
            h_GNE = layout.with_memory(self.memory_tokens.to(dtype), h_GNE)
        cos, sin = self.rotary_pos_emb.tables(layout.memory + layout.frames, self.head_dim, rounding)
        if layout.positions is not None:
            cos, sin = cos.index_select(0, layout.positions), sin.index_select(0, layout.positions)
        shared = Shared(
            context_BSE=context[0],
            repeated=context[1],
            local_GTC=local_GTC,
            rotary=(cos, sin, self.rotary_pos_emb.inv_freq.numel()),
            layout=layout,
        )
        # Blocks draw no random numbers, and CUDA graph capture must not read a generator's state.
        recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        # Formed per use, the next block's weights overwrite those that a saved block would need in its backward pass.
        recomputed = self.recomputed_blocks if self.form_block is None else len(self.layers)
        recomputed = recomputed if torch.is_grad_enabled() else 0
        for i, modulation in enumerate(self.modulations(global_BE, dtype)):
            run = self.block_runners.get(i, recompute if i < recomputed else call)
            h_GNE = run(self._form_and_run, self.run_block, i, h_GNE, modulation, shared)
        return self.project_out(layout.without_memory(h_GNE))

    def _form_and_run(self, run_block: Callable[..., Tensor], index: int, *arguments) -> Tensor:
        if self.form_block is not None:
            self.form_block(index)
        return run_block(self.layers[index], *arguments)

    def modulations(self, global_BE: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Six (B, E) tensors per layer, computed for all layers in a few operations."""
        own_L6E = torch.stack([layer.to_scale_shift_gate.to(dtype) for layer in self.layers])
        both = (own_L6E[:, None] + self.global_cond_embedder(global_BE)).to(dtype)
        # (L, B, 6E): scale, shift, gate of the attention, then of the feed-forward.
        parts = both.unflatten(-1, (2, 3, -1))
        scale = 1 + parts[..., 0, :]
        shift = parts[..., 1, :]
        gate = torch.sigmoid(1 - parts[..., 2, :])
        # One unbind: the gradient of separate slices would fill, copy and add a tensor of all layers for each.
        each_BE = torch.stack([scale, shift, gate], dim=3).permute(0, 2, 3, 1, 4).flatten(0, 2).unbind()
        return [each_BE[i : i + 6] for i in range(0, len(each_BE), 6)]


def working_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The activations' dtype for weights of dtype ``stored``: the same, or autocast's if both are 16-bit.

    torch does not mix the two: a float16 base trains under bfloat16 autocast with bfloat16 activations.
    """
    if stored.itemsize == 2 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return stored


def call(function, *arguments):
    return function(*arguments)


def residual(conv: nn.Module, x_GCT: Tensor) -> Tensor:
    # Convolutions refuse zero frames, which are left where a padding mask leaves none valid.
    return conv(x_GCT) + x_GCT if x_GCT.shape[-1] else x_GCT


class DiT(nn.Module):
    """Velocity of noisy latents. Source: Stable Audio 3's network, under the names of the released files."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, channels = config.embed_dim, config.io_channels
        self.to_timestep_embed = two_layers(FEATURES, width, bias=True)
        self.to_cond_embed = two_layers(config.cond_token_dim, width, bias=False)
        self.to_global_embed = two_layers(config.global_cond_dim, width, bias=False)
        self.preprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.postprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.transformer = Transformer(config)
        self.reference_numerics = False

    @property
    def dtype(self) -> torch.dtype:
        """The frozen base's dtype, read from a tensor that no adapter replaces."""
        return self.transformer.layers[0].to_scale_shift_gate.dtype

    def timestep_features(self, t_B: Tensor) -> Tensor:
        """Fourier features of t (B, 256), float32. Unlike in the reference, t is not rounded to the base's dtype."""
        value = t_B.float()
        if self.config.timestep_features_logsnr:
            inside = value.clamp(1e-7, 1 - 1e-7)
            value = (5 - torch.log((1 - inside) / inside).clamp(-12, 5)) / 17
        if self.reference_numerics:
            value = value.to(self.dtype)
        return expo_features(value)

    def forward(
        self,
        x_BCT: Tensor,
        t_B: Tensor,
        cross_BSC: Tensor,
        global_BC: Tensor,
        local_BCT: Tensor | None = None,
        padding_mask_BT: Tensor | None = None,
        repeated: tuple[int, int] | None = None,
        packing: Packing | FilledPacking | None = None,
    ) -> Tensor:
        """Velocity (B, C, T) in float32.

        x_BCT, t_B       noisy latents and their time, 0 data .. 1 noise; t stays float32 until its features
        cross_BSC        prompt tokens, then the seconds token; all are attended to. global_BC: seconds embedding
        local_BCT        inpainting mask, then masked latents; (1 or B, C+1, T), or T = 1 for the same value at all
                         frames. None skips the local branch, which differs from zeros
        padding_mask_BT  bool, True = valid. Padded frames are not attended to. They must be finite
        repeated         (position, count): the token of cross_BSC that stands for ``count`` equal consecutive ones
        packing          precomputed from that mask, on the device of x: padded frames are not computed, but zero
        """
        dtype = working_dtype(self.dtype, x_BCT.device)
        context = self.to_cond_embed(cross_BSC.to(dtype)), repeated
        embed = self.to_global_embed(global_BC.to(dtype))
        embed = embed + self.to_timestep_embed(self.timestep_features(t_B).to(dtype))
        x_BTC = x_BCT.to(dtype).transpose(1, 2)
        local = None if local_BCT is None else local_BCT.to(dtype).transpose(1, 2)
        layouts = self.layouts(x_BCT, padding_mask_BT, packing)
        parts = [self._velocity(layout, x_BTC, context, embed, local, dtype) for layout in layouts]
        # Each layout returns zeros at frames it does not compute.
        return functools.reduce(torch.add, parts)

    def layouts(
        self, x_BCT: Tensor, padding_mask_BT: Tensor | None, packing: Packing | FilledPacking | None
    ) -> list[Padded | Packed | Filled]:
        """The layouts to compute; the velocity is the sum over them."""
        frames, memory = x_BCT.shape[2], self.transformer.memory
        if isinstance(packing, FilledPacking):
            device = x_BCT.device
            products = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype
            inner = int(self.config.embed_dim * self.config.ff_kwargs.mult)
            kernels = kernel_works(device, products), FUSED_GATE and gate_kernel_works(device, products, inner)
            return [Filled(packing, len(x_BCT), frames, memory, *kernels)]
        if packing is not None:
            return [Packed(packing, memory)]
        if padding_mask_BT is None or padding_mask_BT.device.type != "cpu":
            # Packing reads the mask on the host, which would wait for the device.
            return [Padded(frames, memory, padding_mask_BT)]
        layouts = [Packed(Packing.of(padding_mask_BT), memory)]
        if not padding_mask_BT.all():
            # The reference computes padded frames too, without attention and feed-forward. Return its values.
            layouts.append(Packed(Packing.of(~padding_mask_BT), memory=0, attends=False))
        return layouts

    def _velocity(self, layout: Padded | Packed | Filled, x_BTC: Tensor, context, embed, local_BTC, dtype) -> Tensor:
        """Velocity of the layout's frames, (B, C, T) float32; zero at other frames."""
        x_GCT = layout.take(x_BTC).transpose(1, 2)
        x_GCT = residual(self.preprocess_conv, x_GCT)
        if local_BTC is not None and local_BTC.shape[:2] != (1, 1):
            local_BTC = layout.take(local_BTC)
        rounding = self.dtype if self.reference_numerics else None
        y_GTC = self.transformer(x_GCT.transpose(1, 2), context, embed, local_BTC, layout, dtype, rounding)
        y_GCT = y_GTC.transpose(1, 2)
        y_GCT = residual(self.postprocess_conv, y_GCT)
        return layout.put(y_GCT.transpose(1, 2)).transpose(1, 2).float()
