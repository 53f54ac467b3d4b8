"""The SAME autoencoder: stereo audio to latents and back, in memory linear in the length.

Legend: B batch, C channels, L patches, T latent frames, S patches per frame (the stride), W width, N = T * (S + 1).
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3dist.model.blocks import DyT, FeedForward, RMSNorm, RotaryEmbedding, SelfAttention, in_one_call
from sa3dist.model.chunking import windows
from sa3dist.model.config import AutoencoderConfig, BottleneckConfig, ResamplingConfig
from sa3dist.model.sliding_window import SlidingWindow

# Without DyT both the block and the q/k norms are RMS norms with this epsilon.
RMS_EPS = 1e-3
# Noise on the decoder's latents, relative to running_std. Source: the reference's bottleneck in eval mode.
DECODE_NOISE = 1e-3


class WeightNormConv(nn.Module):
    """Conv1d with ``weight = weight_g * weight_v / |weight_v|``, zero padding that keeps the length."""

    def __init__(self, inner: int, outer: int, kernel: int, bias: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(outer, 1, 1))
        self.weight_v = nn.Parameter(torch.zeros(outer, inner, kernel))
        self.bias = nn.Parameter(torch.zeros(outer)) if bias else None

    def forward(self, x_BCL: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight_v, dim=(1, 2), keepdim=True)
        return F.conv1d(x_BCL, self.weight_v * (self.weight_g / norm), self.bias, padding=self.weight_v.shape[-1] // 2)


class Layer(nn.Module):
    """Pre-norm self-attention and feed-forward, without modulation."""

    def __init__(self, config: ResamplingConfig, sinusoidal: bool):
        super().__init__()
        width = config.width
        head_dim = min(config.dim_heads, width)
        self.pre_norm = DyT(width) if config.dyt else RMSNorm(width, RMS_EPS)
        self.self_attn = SelfAttention(width, head_dim, config.differential, "dyt" if config.dyt else "rms", RMS_EPS)
        self.ff_norm = DyT(width) if config.dyt else RMSNorm(width, RMS_EPS)
        self.ff = FeedForward(width, config.ff_mult, sinusoidal)
        self.rope = RotaryEmbedding(config.dim_heads // 2)

    def forward(self, h_BNW: Tensor, attend) -> Tensor:
        rotary = (*self.rope.tables(h_BNW.shape[1], self.self_attn.head_dim), self.rope.inv_freq.numel())
        h_BNW = h_BNW + self.self_attn(self.pre_norm(h_BNW), rotary, functools.partial(in_one_call, attend))
        return h_BNW + self.ff(self.ff_norm(h_BNW))


class Resampler(nn.Module):
    """The transformer of both directions: groups of S old and new tokens, a window or chunks, per-token layers."""

    def __init__(self, config: ResamplingConfig, token_count: int, sinusoidal_blocks: int, inner: int, outer: int):
        super().__init__()
        self.config = config
        depth = config.transformer_depths[0]
        self.new_tokens = nn.Parameter(torch.zeros(1, token_count, config.width))
        self.transformers = nn.ModuleList(Layer(config, depth - i < sinusoidal_blocks) for i in range(depth))
        kernel = 3 if config.conv_mapping else 1
        self.mapping = nn.Identity() if inner == outer else WeightNormConv(inner, outer, kernel, config.mapping_bias)

    def tokens(self, groups: int, count: int, noise: Tensor | None) -> Tensor:
        """New tokens for every group, (groups, count, W), with ``mask_noise`` times the given standard normals."""
        tokens = self.new_tokens.expand(groups, count, -1)
        return tokens if noise is None else tokens + self.config.mask_noise * noise

    def layers(self, h_BNW: Tensor) -> Tensor:
        step = self.config.stride + 1
        if self.config.sliding_window:
            left, right = self.config.sliding_window
            window = SlidingWindow(h_BNW.shape[1], left * step, right * step, h_BNW.device)
            for layer in self.transformers:
                h_BNW = layer(h_BNW, window.attend)
            return h_BNW
        chunk = self.config.frames_per_chunk * step
        if not self.config.chunk_midpoint_shift:
            return in_chunks(self.transformers, h_BNW, chunk)
        half = len(self.transformers) // 2
        h_BNW = in_chunks(self.transformers[:half], h_BNW, chunk)
        shift = chunk // 2
        # In the second half of the layers, chunks span the borders of the first half's chunks.
        h_BNW = torch.cat([h_BNW[:, :shift], h_BNW, h_BNW[:, -shift:]], dim=1)
        return in_chunks(self.transformers[half:], h_BNW, chunk)[:, shift:-shift]


def in_chunks(layers: nn.ModuleList, h_BNW: Tensor, chunk: int) -> Tensor:
    """Run layers on consecutive chunks that see only themselves; positions restart in every chunk."""
    batch = h_BNW.shape[0]
    h = h_BNW.reshape(-1, chunk, h_BNW.shape[2])
    for layer in layers:
        h = layer(h, F.scaled_dot_product_attention)
    return h.reshape(batch, -1, h.shape[2])


class Downsampler(Resampler):
    """Patches to one vector per latent frame: the new token at the end of each group summarises the group."""

    def __init__(self, config: ResamplingConfig):
        super().__init__(config, 1, 0, config.in_channels, config.width)

    def forward(self, x_BCL: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, C, L) to (B, T, W). The input is zero-padded to whole groups before the mapping."""
        stride = self.config.stride
        x_BCL = F.pad(x_BCL, (0, -x_BCL.shape[2] % (stride * self.config.frames_per_chunk)))
        x_BLW = self.mapping(x_BCL).transpose(1, 2)
        batch, length, width = x_BLW.shape
        groups = x_BLW.reshape(-1, stride, width)
        groups = torch.cat([groups, self.tokens(len(groups), 1, noise)], dim=1)
        h_BNW = self.layers(groups.reshape(batch, -1, width))
        return h_BNW[:, stride :: stride + 1]


class Upsampler(Resampler):
    """Latent frames to patches: every frame is followed by S new tokens, which become its patches."""

    def __init__(self, config: ResamplingConfig):
        tokens = 1 if config.variable_stride else config.stride
        super().__init__(config, tokens, config.sinusoidal_blocks[0], config.width, config.out_channels)

    def forward(self, x_BTW: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, T, W) to (B, C, L); T is zero-padded to whole chunks, so L may exceed T * S."""
        stride = self.config.stride
        x_BTW = F.pad(x_BTW, (0, 0, 0, -x_BTW.shape[1] % self.config.frames_per_chunk))
        batch, frames, width = x_BTW.shape
        groups = x_BTW.reshape(-1, 1, width)
        groups = torch.cat([groups, self.tokens(len(groups), stride, noise)], dim=1)
        h_BNW = self.layers(groups.reshape(batch, -1, width))
        patches = h_BNW.unflatten(1, (frames, stride + 1))[:, :, 1:].flatten(1, 2)
        return self.mapping(patches.transpose(1, 2))


class Encoder(nn.Module):
    """Patched audio to latents before the bottleneck. List positions are those of the file's keys."""

    def __init__(self, config: ResamplingConfig):
        super().__init__()
        self.layers = nn.ModuleList([Downsampler(config), nn.Identity(), nn.Linear(config.width, config.latent_dim)])

    def forward(self, patches_BCL: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.layers[2](self.layers[0](patches_BCL, noise)).transpose(1, 2)


class Decoder(nn.Module):
    """Latents after the bottleneck to patched audio."""

    def __init__(self, config: ResamplingConfig):
        super().__init__()
        project = nn.Linear(config.latent_dim, config.width)
        self.layers = nn.ModuleList([nn.Identity(), project, nn.Identity(), Upsampler(config)])

    def forward(self, latents_BCT: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.layers[3](self.layers[1](latents_BCT.transpose(1, 2)), noise)


class Bottleneck(nn.Module):
    """Scale, shift and normalise. Decoding undoes the normalisation only: the affine part is one-way."""

    def __init__(self, config: BottleneckConfig):
        super().__init__()
        self.scaling_factor = nn.Parameter(torch.ones(1, config.dim, 1))
        self.bias = nn.Parameter(torch.zeros(1, config.dim, 1))
        self.noise_scaling_factor = nn.Parameter(torch.zeros(1, 0, 1))
        self.register_buffer("running_std", torch.ones(1) if config.auto_scale else None)

    def encode(self, x_BCT: Tensor) -> Tensor:
        z = x_BCT * self.scaling_factor + self.bias
        return z if self.running_std is None else z / self.running_std

    def decode(self, z_BCT: Tensor, noise: Tensor | None = None) -> Tensor:
        std = 1.0 if self.running_std is None else self.running_std
        return z_BCT * std if noise is None else z_BCT * std + noise * (std * DECODE_NOISE)


class Autoencoder(nn.Module):
    """Audio to latents and back. The noise that the reference always adds is off unless its draws are given."""

    def __init__(self, config: AutoencoderConfig, parts: tuple[str, ...] = ("encoder", "decoder")):
        super().__init__()
        self.config = config
        self.bottleneck = Bottleneck(config.bottleneck)
        # A part left out has no tensors, neither in memory nor in the state dict, until it is assigned.
        self.register_module("encoder", Encoder(config.encoder) if "encoder" in parts else None)
        self.register_module("decoder", Decoder(config.decoder) if "decoder" in parts else None)

    def patch(self, audio_BCN: Tensor) -> Tensor:
        """(B, C, N) to (B, C * P, ceil(N / P)): channel major, sample in patch minor, zero-padded on the right."""
        size = self.config.patching.patch_size
        audio = F.pad(audio_BCN, (0, -audio_BCN.shape[2] % size)).unflatten(2, (-1, size))
        return audio.transpose(2, 3).flatten(1, 2)

    def unpatch(self, patches_BCL: Tensor) -> Tensor:
        patches = patches_BCL.unflatten(1, (self.config.patching.channels, -1))
        return patches.transpose(2, 3).flatten(2)

    def encode_once(self, audio_BCN: Tensor, noise: Tensor | None = None) -> Tensor:
        """All latents in one pass, (B, C, T), whole chunks uncropped. ``noise``: normals, (B * T, 1, W)."""
        return self.bottleneck.encode(self.encoder(self.patch(audio_BCN), noise))

    def decode_once(self, latents_BCT: Tensor, noises: tuple[Tensor, Tensor] = (None, None)) -> Tensor:
        """All audio in one pass. ``noises``: normals like the latents and (B * T, S, W) for the new tokens."""
        patches = self.decoder(self.bottleneck.decode(latents_BCT, noises[0]), noises[1])
        audio = self.unpatch(patches)
        return torch.tanh(audio) if self.config.soft_clip else audio

    def encode(self, audio_BCN: Tensor) -> Tensor:
        """(B, C, N) to (B, D, ceil(N / samples per frame)): long clips window by window, in bounded memory."""
        size = self.config.downsampling_ratio
        frames = math.ceil(audio_BCN.shape[2] / size)
        out = None
        for window in windows(frames, self.config.encoder.frames_per_chunk, self.config.chunked):
            z = self.encode_once(audio_BCN[:, :, window.start * size : window.stop * size])
            if out is None:
                out = z.new_empty(z.shape[0], z.shape[1], frames)
            out[:, :, window.keep : window.stop] = z[:, :, window.keep - window.start : window.stop - window.start]
        return out

    def decode(self, latents_BDT: Tensor) -> Tensor:
        """(B, D, T) to (B, C, T * samples per frame): long clips window by window."""
        size = self.config.downsampling_ratio
        batch, _, frames = latents_BDT.shape
        out = latents_BDT.new_empty(batch, self.config.patching.channels, frames * size)
        for window in windows(frames, self.config.decoder.frames_per_chunk, self.config.chunked):
            audio = self.decode_once(latents_BDT[:, :, window.start : window.stop])
            new = audio[:, :, (window.keep - window.start) * size : (window.stop - window.start) * size]
            out[:, :, window.keep * size : window.stop * size] = new
        return out
