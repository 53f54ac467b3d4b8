"""Building blocks shared by the DiT and the SAME autoencoder: norms, Fourier features, rotary tables, attention, GLU.

Legend: B batch, N sequence, E channels, H heads, D head width, P members of a differential pair (1 or 2).
"""

import math

import torch
import torch.nn.functional as F
from sa3dist_kernels.gated_linear import silu_gated
from torch import Tensor, nn

from sa3dist.model.frequencies import expo_frequencies


class RMSNorm(nn.Module):
    """``gamma * x / sqrt(mean(x^2) + eps)`` over the last axis.

    force_fp32  compute in float32, gamma included, and cast the result back, as in the DiT's block norms
    """

    def __init__(self, width: int, eps: float, force_fp32: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.force_fp32 = force_fp32

    def forward(self, x: Tensor) -> Tensor:
        width = self.gamma.shape
        if not self.force_fp32:
            # A float32 gamma with a bfloat16 x, as under autocast, would not use the fused kernel.
            return F.rms_norm(x, width, self.gamma.to(x.dtype), self.eps)
        if x.dtype == self.gamma.dtype:
            # The fused kernel already computes in float32 and rounds once at the end.
            with torch.autocast(x.device.type, enabled=False):
                return F.rms_norm(x, width, self.gamma, self.eps)
        return F.rms_norm(x.float(), width, self.gamma.float(), self.eps).to(x.dtype)


class DyT(nn.Module):
    """``gamma * tanh(alpha * x) + beta``: a norm without statistics. Source: DyT, arXiv:2503.10622."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.gamma, torch.tanh(self.alpha * x))


def expo_features(values: Tensor) -> Tensor:
    """Exponential Fourier features of one number per item.

    values  any shape, cast to float32
    Returns float32 of shape (*values.shape, 256), cosines first. The order of the float32 multiplications matters.
    """
    angles = ((values.float().unsqueeze(-1) * expo_frequencies(values.device)) * 2) * math.pi
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RotaryEmbedding(nn.Module):
    """Rotary position tables from the checkpoint's ``inv_freq``, which stays float32 when the module is cast."""

    def __init__(self, rotated_width: int):
        super().__init__()
        # On the CPU even under torch.device("meta"): arange on the meta device imports the whole compiler (loading a
        # tiny base takes 2.9 s of CPU time instead of 0.13 s).
        exponents = torch.arange(0, rotated_width, 2, dtype=torch.float32, device="cpu") / rotated_width
        self.register_buffer("inv_freq", 10000.0**-exponents)

    def _apply(self, fn, recurse=True):
        inv_freq = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            # Undo the cast: with bfloat16 frequencies the angle at position 4159 is off by 0.7 rad.
            self.inv_freq = inv_freq.to(self.inv_freq.device, torch.float32)
        return self

    def tables(self, length: int, head_dim: int, rounding: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines for positions 0..length-1, each (length, head_dim) float32.

        Columns past the rotated width are 1 and 0, so that one multiply-add covers the whole head.
        rounding    round the frequencies to this dtype first, as the reference does when cast
        """
        frequencies = self.inv_freq if rounding is None else self.inv_freq.to(rounding).float()
        positions = torch.arange(length, device=frequencies.device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        rest = head_dim - 2 * frequencies.numel()
        return (
            F.pad(torch.cat([cos, cos], dim=-1), (0, rest), value=1.0),
            F.pad(torch.cat([-sin, sin], dim=-1), (0, rest)),
        )


def rotate(x_NPHD: Tensor, cos_ND: Tensor, signed_sin_ND: Tensor, half: int) -> Tensor:
    """Rotate the first ``2 * half`` channels of each head; ``x`` is (..., N, P, H, D). Returns float32.

    Channel j is paired with j + half.
    """
    swapped = torch.cat([x_NPHD[..., half : 2 * half], x_NPHD[..., :half], x_NPHD[..., 2 * half :]], dim=-1)
    cos, sin = cos_ND[:, None, None], signed_sin_ND[:, None, None]
    return x_NPHD * cos + swapped * sin


def norm_and_rotate(norm: nn.Module, x_NPHD: Tensor, rotary: tuple[Tensor, Tensor, int], dtype: torch.dtype) -> Tensor:
    """Normed and rotated queries or keys, in ``dtype``."""
    return rotate(norm(x_NPHD), *rotary).to(dtype)


def in_one_call(attend, q_BNPHD: Tensor, k_BSPHD: Tensor, v_BS1HD: Tensor) -> Tensor:
    """Attention (B, N, H * D) of both members of a differential pair, or the only one, as one call with more heads.

    attend   attention over (B, P * H, N, D), called like scaled_dot_product_attention
    """
    pairs = q_BNPHD.shape[2]
    v_BSPHD = v_BS1HD.expand(-1, -1, pairs, -1, -1)
    out_BHND = attend(*(x.flatten(2, 3).transpose(1, 2) for x in (q_BNPHD, k_BSPHD, v_BSPHD)))
    if pairs == 2:
        first, second = out_BHND.chunk(2, dim=1)
        out_BHND = first - second
    return out_BHND.transpose(1, 2).flatten(2)


def make_head_norm(kind: str, head_dim: int, eps: float) -> nn.Module:
    """The q/k norm, computed in the input's dtype. Raises KeyError for an unknown kind."""
    return {"none": nn.Identity, "rms": lambda: RMSNorm(head_dim, eps), "dyt": lambda: DyT(head_dim)}[kind]()


def repeat_token(x_BSE: Tensor, repeated: tuple[int, int] | None) -> Tensor:
    """``x`` with the token at ``repeated[0]`` repeated ``repeated[1]`` times; unchanged for None."""
    if repeated is None:
        return x_BSE
    position, count = repeated
    before, token, after = x_BSE.split([position, 1, x_BSE.shape[1] - position - 1], dim=1)
    return torch.cat([before, token.expand(-1, count, -1), after], dim=1)


class Attention(nn.Module):
    """Common part of plain and differential attention; subclasses define which rows hold q, k and v.

    Differential: ``softmax(q k^T) v - softmax(q' k'^T) v``.
    """

    def __init__(self, width: int, head_dim: int, differential: bool, qk_norm: str, qk_norm_eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.pairs = 2 if differential else 1
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = make_head_norm(qk_norm, head_dim, qk_norm_eps)
        self.k_norm = make_head_norm(qk_norm, head_dim, qk_norm_eps)

    def heads(self, x_BNE: Tensor, parts: int) -> Tensor:
        """(B, N, parts * E) to (B, N, parts, H, D)."""
        return x_BNE.unflatten(-1, (parts, -1, self.head_dim))


class SelfAttention(Attention):
    """Rows of ``to_qkv``: q, k, v or, differential, q, k, v, q', k'."""

    # ``compile_elementwise`` may replace this by a compiled one.
    norm_and_rotate = staticmethod(norm_and_rotate)

    def __init__(self, width: int, head_dim: int, differential: bool, qk_norm: str, qk_norm_eps: float):
        super().__init__(width, head_dim, differential, qk_norm, qk_norm_eps)
        self.to_qkv = nn.Linear(width, (2 * self.pairs + 1) * width, bias=False)

    def forward(self, x_BNE: Tensor, rotary: tuple[Tensor, Tensor, int], attend_pairs, attend_qkv=None) -> Tensor:
        """Self-attention of the tokens of each clip.

        rotary        cosines, signed sines, half the number of rotated channels
        attend_pairs  see ``token_layout.Layout``
        attend_qkv    see ``token_layout.Filled``; used instead of ``attend_pairs`` if the q/k norms are RMS norms
        """
        qkv = self.heads(self.to_qkv(x_BNE), 2 * self.pairs + 1)
        if attend_qkv is not None and isinstance(self.q_norm, RMSNorm):
            return self.to_out(attend_qkv(qkv, self.q_norm, self.k_norm, rotary))
        q, k, v = qkv[:, :, 0::3], qkv[:, :, 1::3], qkv[:, :, 2:3]
        q = self.norm_and_rotate(self.q_norm, q, rotary, v.dtype)
        k = self.norm_and_rotate(self.k_norm, k, rotary, v.dtype)
        return self.to_out(attend_pairs(q, k, v))


class CrossAttention(Attention):
    """Rows of ``to_q``: q or q, q'; of ``to_kv``: k, v or k, k', v. No rotation and no mask."""

    def __init__(self, width: int, head_dim: int, differential: bool, qk_norm: str, qk_norm_eps: float):
        super().__init__(width, head_dim, differential, qk_norm, qk_norm_eps)
        self.to_q = nn.Linear(width, self.pairs * width, bias=False)
        self.to_kv = nn.Linear(width, (self.pairs + 1) * width, bias=False)

    def forward(self, x_GNE: Tensor, context_BSE: Tensor, repeated: tuple[int, int] | None, attend_pairs) -> Tensor:
        """Attention of the tokens to their clip's context.

        repeated      (position, count) of a context token that stands for several equal consecutive ones, or None
        attend_pairs  ``token_layout.Layout.attend_pairs_to_context``
        """
        kv = self.heads(repeat_token(self.to_kv(context_BSE), repeated), self.pairs + 1)
        k, v = kv[:, :, : self.pairs], kv[:, :, self.pairs :]
        q = self.q_norm(self.heads(self.to_q(x_GNE), self.pairs)).to(v.dtype)
        k = self.k_norm(k).to(v.dtype)
        return self.to_out(attend_pairs(q, k, v))


def silu_gate(x: Tensor) -> Tensor:
    """``a * silu(g)`` with ``[a, g] = x``."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def sine_gate(x: Tensor) -> Tensor:
    """``a * sin(pi g)`` with ``[a, g] = x``."""
    value, gate = x.chunk(2, dim=-1)
    return value * torch.sin(math.pi * gate)


class GatedProjection(nn.Module):
    """``a * act(g)`` with ``[a, g] = proj(x)``: the second half is the gate; act is SiLU or ``sin(pi g)``."""

    def __init__(self, width: int, inner: int, sinusoidal: bool):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)
        self.sinusoidal = sinusoidal
        # ``compile_elementwise`` may replace this by a compiled one.
        self.gate = sine_gate if sinusoidal else silu_gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.proj(x))


class FeedForward(nn.Module):
    """Gated feed-forward; ``inner`` is ``mult`` times the width. The Identity keeps the file's key ``ff.2``."""

    def __init__(self, width: int, mult: float, sinusoidal: bool = False):
        super().__init__()
        inner = int(width * mult)
        self.ff = nn.Sequential(GatedProjection(width, inner, sinusoidal), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor, fused_gate: bool = False) -> Tensor:
        """fused_gate: use the SiLU gate whose backward pass is one kernel that saves only the gate's input."""
        gated, last = self.ff[0], self.ff[2]
        if not fused_gate or gated.sinusoidal:
            return self.ff(x)
        # Adapted layers offer fused forms that plain layers lack.
        z, bias = gated.proj.before_bias(x) if hasattr(gated.proj, "before_bias") else (gated.proj(x), None)
        return last.of_gated(z, bias) if hasattr(last, "of_gated") else last(silu_gated(z, bias))
