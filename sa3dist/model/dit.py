"""The diffusion transformer: noisy latents and conditioning in, velocity out.

Legend: B batch, C latent channels, T latent frames, M memory tokens, N = M + T, S context tokens, E width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


class Shared(NamedTuple):
    """What every layer of one forward reads, computed once.

    context_BSE, repeated (the context token that stands for several, see CrossAttention), local_BTC (or None; T may be
    1, standing for every frame), rotary (cos, signed sin, half width), valid_BN (or None: nothing is padding), memory
    (how many leading tokens are not frames)
    """

    context_BSE: Tensor
    repeated: tuple[int, int] | None
    local_BTC: Tensor | None
    rotary: tuple[Tensor, Tensor, int]
    valid_BN: Tensor | None
    memory: int


def two_layers(inner: int, outer: int, bias: bool) -> nn.Sequential:
    """Linear, SiLU, Linear: the shape of every conditioning embedder."""
    return nn.Sequential(nn.Linear(inner, outer, bias=bias), nn.SiLU(), nn.Linear(outer, outer, bias=bias))


def make_block_norm(config: DiTConfig) -> nn.Module:
    if config.norm_type == "dyt":
        return DyT(config.embed_dim)
    return RMSNorm(config.embed_dim, config.norm_kwargs.eps, config.norm_kwargs.force_fp32)


class Block(nn.Module):
    """One layer: modulated self-attention, cross-attention, local conditioning, modulated feed-forward."""

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

    def forward(self, h_BNE: Tensor, modulation: tuple[Tensor, ...], shared: Shared) -> Tensor:
        """modulation: 1 + scale, shift, opened gate of the attention, then of the feed-forward, each (B, 1, E)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation
        attend = F.scaled_dot_product_attention
        if shared.valid_BN is not None:
            attend = functools.partial(attend, attn_mask=shared.valid_BN[:, None, None])
        branch = self.self_attn(torch.addcmul(shift1, self.pre_norm(h_BNE), scale1), shared.rotary, attend)
        h_BNE = torch.addcmul(h_BNE, gate1, drop_padding(branch, shared.valid_BN).to(h_BNE.dtype))
        h_BNE = h_BNE + self.cross_attn(self.cross_attend_norm(h_BNE), shared.context_BSE, shared.repeated).to(
            h_BNE.dtype
        )
        if shared.local_BTC is not None:
            local = self.to_local_embed(shared.local_BTC).to(h_BNE.dtype)
            frames = h_BNE.shape[1] - shared.memory
            h_BNE = h_BNE + F.pad(local.expand(-1, frames, -1), (0, 0, shared.memory, 0))
        branch = self.ff(torch.addcmul(shift2, self.ff_norm(h_BNE), scale2))
        return torch.addcmul(h_BNE, gate2, drop_padding(branch, shared.valid_BN).to(h_BNE.dtype))


def drop_padding(branch_BNE: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Packed semantics: attention and feed-forward add nothing at padded frames."""
    return branch_BNE if valid_BN is None else branch_BNE * valid_BN[..., None]


class Transformer(nn.Module):
    """Memory tokens, rotary positions and the layers, between the two channel projections."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width, channels = config.embed_dim, config.io_channels
        self.head_dim = config.head_dim
        self.gradient_checkpointing = False
        self.project_in = nn.Linear(channels, width, bias=False)
        self.project_out = nn.Linear(width, channels, bias=False)
        self.memory = config.num_memory_tokens
        if self.memory:
            self.memory_tokens = nn.Parameter(torch.zeros(self.memory, width))
        self.rotary_pos_emb = RotaryEmbedding(max(config.head_dim // 2, 32))
        self.global_cond_embedder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(
        self,
        x_BTC: Tensor,
        context_BSE: Tensor,
        repeated,
        global_BE: Tensor,
        local_BTC,
        padding_mask_BT,
        dtype,
        rounding,
    ) -> Tensor:
        h_BNE = self.project_in(x_BTC).to(dtype)
        if self.memory:
            h_BNE = torch.cat([self.memory_tokens.to(dtype).expand(len(h_BNE), -1, -1), h_BNE], dim=1)
        cos, sin = self.rotary_pos_emb.tables(h_BNE.shape[1], self.head_dim, rounding)
        shared = Shared(
            context_BSE=context_BSE,
            repeated=repeated,
            local_BTC=local_BTC,
            rotary=(cos, sin, self.rotary_pos_emb.inv_freq.numel()),
            valid_BN=None if padding_mask_BT is None else F.pad(padding_mask_BT, (self.memory, 0), value=True),
            memory=self.memory,
        )
        run = functools.partial(checkpoint, use_reentrant=False)
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            run = call
        for layer, modulation in zip(self.layers, self.modulations(global_BE, dtype), strict=True):
            h_BNE = run(layer, h_BNE, modulation, shared)
        return self.project_out(h_BNE[:, self.memory :])

    def modulations(self, global_BE: Tensor, dtype: torch.dtype):
        """Six (B, 1, E) tensors for every layer, all layers in a handful of operations."""
        own_L6E = torch.stack([layer.to_scale_shift_gate.to(dtype) for layer in self.layers])
        both = (own_L6E[:, None] + self.global_cond_embedder(global_BE)).to(dtype).unsqueeze(2)
        # (L, B, 1, 6E): scale, shift, gate of the attention, then of the feed-forward.
        parts = both.unflatten(-1, (2, 3, -1))
        scale = 1 + parts[..., 0, :]
        shift = parts[..., 1, :]
        gate = torch.sigmoid(1 - parts[..., 2, :])
        for i in range(len(self.layers)):
            yield tuple(part[i, ..., half, :] for half in (0, 1) for part in (scale, shift, gate))


def working_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Format of activations over weights stored as ``stored``: the same, unless autocast uses another 16-bit format.

    torch refuses to mix the two: a float16 base trains under bfloat16 autocast with bfloat16 activations.
    """
    if stored.itemsize == 2 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return stored


def call(function, *arguments):
    return function(*arguments)


class DiT(nn.Module):
    """Velocity of noisy latents. Source: Stable Audio 3's network, under the names of the released files."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, channels = config.embed_dim, config.io_channels
        self.to_timestep_embed = two_layers(config.timestep_features_dim, width, bias=True)
        self.to_cond_embed = two_layers(config.cond_token_dim, width, bias=False)
        self.to_global_embed = two_layers(config.global_cond_dim, width, bias=False)
        self.preprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.postprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.transformer = Transformer(config)
        self.reference_numerics = False

    @property
    def dtype(self) -> torch.dtype:
        """The frozen base's dtype: read from a tensor no adapter replaces."""
        return self.transformer.layers[0].to_scale_shift_gate.dtype

    def timestep_features(self, t_B: Tensor) -> Tensor:
        """Fourier features of t, float32 in and out; (B, 256). Unlike the reference, t is not rounded to the dtype."""
        value = t_B.float()
        if self.config.timestep_features_logsnr:
            inside = value.clamp(1e-7, 1 - 1e-7)
            value = (5 - torch.log((1 - inside) / inside).clamp(-12, 5)) / 17
        if self.reference_numerics:
            value = value.to(self.dtype)
        return expo_features(value, self.config.timestep_features_dim)

    def forward(
        self,
        x_BCT: Tensor,
        t_B: Tensor,
        cross_BSC: Tensor,
        global_BC: Tensor,
        local_BCT: Tensor | None = None,
        padding_mask_BT: Tensor | None = None,
        repeated: tuple[int, int] | None = None,
    ) -> Tensor:
        """Velocity (B, C, T) in float32.

        x_BCT            noisy latents         t_B              0 data .. 1 noise, kept float32 up to its features
        cross_BSC        prompt tokens then the seconds token, all attended
        global_BC        seconds embedding
        local_BCT        inpainting mask then masked latents; (1 or B, C+1, T), or T = 1 for the same value at every
                         frame. None leaves the local branch out, which is not the same as zeros.
        padding_mask_BT  bool, True = valid. Padded frames are attended by nobody. They must be finite.
        repeated         (position, count): the token of cross_BSC that stands for ``count`` equal ones in a row
        """
        dtype = working_dtype(self.dtype, x_BCT.device)
        context = self.to_cond_embed(cross_BSC.to(dtype))
        embed = self.to_global_embed(global_BC.to(dtype))
        embed = embed + self.to_timestep_embed(self.timestep_features(t_B).to(dtype))
        x_BCT = x_BCT.to(dtype)
        x_BCT = self.preprocess_conv(x_BCT) + x_BCT
        local = None if local_BCT is None else local_BCT.to(dtype).transpose(1, 2)
        rounding = self.dtype if self.reference_numerics else None
        y_BTC = self.transformer(
            x_BCT.transpose(1, 2), context, repeated, embed, local, padding_mask_BT, dtype, rounding
        )
        y_BCT = y_BTC.transpose(1, 2)
        return (self.postprocess_conv(y_BCT) + y_BCT).float()
