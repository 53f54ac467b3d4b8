"""How a batch's clips are laid out as the transformer's tokens: padded side by side, or packed into one list.

A layout converts frames to tokens and back, and does what depends on which token belongs to which clip. The rest of
the network works token by token on (G, N, E): G = B padded clips, or G = 1 list of all clips' tokens. ``Filled`` is a
packed list of fixed length.

Legend: B clips, C channels, T frames, M memory tokens, H heads (of both members of a pair), S context tokens,
D head width.
"""

import torch
import torch.nn.functional as F
from sa3dist_kernels.qkv_gradient import HeadNorm
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from sa3dist.model.add_scaled import add_scaled
from sa3dist.model.blocks import RMSNorm, in_one_call
from sa3dist.model.packing import FilledPacking, Packing
from sa3dist.model.self_attention import self_attention
from sa3dist.model.varlen_attention import has_kernel, varlen_attention


class Layout:
    """Attention of both members of a differential pair in one call, for ``Padded`` and ``Packed``."""

    # Only ``Filled`` has it.
    attend_qkv = None
    fused_gate = False

    def attend_pairs(self, q_GNPHD: Tensor, k_GNPHD: Tensor, v_GN1HD: Tensor) -> Tensor:
        """Attention within each clip, (G, N, H * D); for a pair the first member's minus the second's."""
        return in_one_call(self.attend, q_GNPHD, k_GNPHD, v_GN1HD)

    def attend_pairs_to_context(self, q_GNPHD: Tensor, k_BSPHD: Tensor, v_BS1HD: Tensor) -> Tensor:
        """The same, of each clip's tokens to its own context."""
        return in_one_call(self.attend_to_context, q_GNPHD, k_BSPHD, v_BS1HD)


class Padded(Layout):
    """All frames of all clips, (B, M + T, E).

    valid_BT   True = valid; None: all are. Padded frames are computed, but they are not attended to, and attention and
               feed-forward add nothing to them
    """

    attends = True

    def __init__(self, frames: int, memory: int, valid_BT: Tensor | None = None):
        self.memory, self.frames = memory, frames
        self.valid_BN = None if valid_BT is None else F.pad(valid_BT, (memory, 0), value=True)
        self.positions = None

    def take(self, x_BTC: Tensor) -> Tensor:
        """The frames to compute, (G, frames, C); where B or T is 1, one row stands for all."""
        return x_BTC

    def put(self, y_BTC: Tensor) -> Tensor:
        """Computed frames back at their positions, (B, T, C)."""
        return y_BTC

    def with_memory(self, memory_ME: Tensor, x_BTE: Tensor) -> Tensor:
        """Memory tokens before each clip's frames."""
        return torch.cat([memory_ME.expand(len(x_BTE), -1, -1), x_BTE], dim=1)

    def without_memory(self, h_BNE: Tensor) -> Tensor:
        return h_BNE[:, self.memory :]

    def modulate(self, h_BNE: Tensor, scale_BE: Tensor, shift_BE: Tensor) -> Tensor:
        """``h * scale + shift`` with the values of each token's clip."""
        return torch.addcmul(shift_BE[:, None], h_BNE, scale_BE[:, None])

    def add_gated(self, h_BNE: Tensor, gate_BE: Tensor, branch_BNE: Tensor) -> Tensor:
        """``h + gate * branch``."""
        if self.valid_BN is not None:
            branch_BNE = branch_BNE * self.valid_BN[..., None]
        return torch.addcmul(h_BNE, gate_BE[:, None], branch_BNE)

    def add_to_frames(self, h_BNE: Tensor, local_BTE: Tensor) -> Tensor:
        """Add ``local`` to the frames, not to memory tokens; T may be 1, which stands for all frames."""
        return h_BNE + F.pad(local_BTE.expand(-1, self.frames, -1), (0, 0, self.memory, 0))

    def attend(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
        """Attention within each clip."""
        mask = None if self.valid_BN is None else self.valid_BN[:, None, None]
        return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=mask)

    def attend_to_context(self, q_BHND: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
        """Attention of each clip's tokens to its own context."""
        return F.scaled_dot_product_attention(q_BHND, k_BHSD, v_BHSD)


class Packed(Layout):
    """Valid frames only, all clips' tokens in one list (1, K, E). ``put`` returns zeros for other frames.

    attends    False skips self-attention and feed-forward: for the values of padded frames
    """

    def __init__(self, packing: Packing, memory: int, attends: bool = True):
        self.packing = packing
        self.memory, self.frames = memory, packing.frames
        self.attends = attends
        self.spans = tuple(memory + length for length in packing.lengths)
        # Rotary positions are those of the padded clip. All tensors are built on the indices' device, without a sync.
        device, clips = packing.frame_F.device, len(self.spans)
        front = torch.arange(memory, device=device)
        frame_positions = (packing.frame_F % packing.frames + memory).split(packing.lengths)
        self.positions = torch.cat([piece for of_clip in frame_positions for piece in (front, of_clip)])
        self.clip_K = torch.cat([torch.full((count,), clip, device=device) for clip, count in enumerate(self.spans)])
        self.start_B1 = torch.searchsorted(self.clip_K, torch.arange(clips + 1, device=device), out_int32=True)
        # Which clip owns a token. A product with it sums over clips' tokens in a fixed order, without atomics.
        self.owner_BK = torch.arange(clips, device=device)[:, None] == self.clip_K

    def take(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.expand(len(self.spans), self.frames, -1).flatten(0, 1).index_select(0, self.packing.frame_F)[None]

    def put(self, y_1FC: Tensor) -> Tensor:
        clips, frames = len(self.spans), self.frames
        empty = y_1FC.new_zeros(clips * frames, y_1FC.shape[-1])
        return empty.index_copy(0, self.packing.frame_F, y_1FC[0]).unflatten(0, (clips, frames))

    def with_memory(self, memory_ME: Tensor, x_1FE: Tensor) -> Tensor:
        pieces = [piece for frames in x_1FE[0].split(self.packing.lengths) for piece in (memory_ME, frames)]
        return torch.cat(pieces)[None]

    def without_memory(self, h_1KE: Tensor) -> Tensor:
        return torch.cat([tokens[:, self.memory :] for tokens in h_1KE.split(self.spans, dim=1)], dim=1)

    def modulate(self, h_1KE: Tensor, scale_BE: Tensor, shift_BE: Tensor) -> Tensor:
        return add_scaled(shift_BE, h_1KE, scale_BE, self.clip_K, self.owner_BK)

    def add_gated(self, h_1KE: Tensor, gate_BE: Tensor, branch_1KE: Tensor) -> Tensor:
        return add_scaled(h_1KE, branch_1KE, gate_BE, self.clip_K, self.owner_BK)

    def add_to_frames(self, h_1KE: Tensor, local_1FE: Tensor) -> Tensor:
        if local_1FE.shape[1] == 1:
            is_frame_K1 = (self.positions >= self.memory)[:, None].to(h_1KE.dtype)
            return torch.addcmul(h_1KE, is_frame_K1, local_1FE)
        pieces = local_1FE.split(self.packing.lengths, dim=1)
        return h_1KE + torch.cat([F.pad(piece, (0, 0, self.memory, 0)) for piece in pieces], dim=1)

    def attend(self, q_1HKD: Tensor, k_1HKD: Tensor, v_1HKD: Tensor) -> Tensor:
        if _takes_unequal_lengths(q_1HKD):
            return self._varlen(q_1HKD, k_1HKD, v_1HKD, self.start_B1, max(self.spans))
        parts = zip(*(x.split(self.spans, dim=2) for x in (q_1HKD, k_1HKD, v_1HKD)), strict=True)
        return _joined([F.scaled_dot_product_attention(*part) for part in parts])

    def attend_to_context(self, q_1HKD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
        if _takes_unequal_lengths(q_1HKD):
            clips, tokens = len(k_BHSD), k_BHSD.shape[2]
            starts = torch.arange(0, (clips + 1) * tokens, tokens, device=q_1HKD.device, dtype=torch.int32)
            k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (k_BHSD, v_BHSD))
            return self._varlen(q_1HKD, k, v, starts, tokens)
        parts = zip(q_1HKD.split(self.spans, dim=2), k_BHSD.split(1), v_BHSD.split(1), strict=True)
        return _joined([F.scaled_dot_product_attention(*part) for part in parts])

    def _varlen(self, q_1HKD: Tensor, k_1HJD: Tensor, v_1HJD: Tensor, key_start_B1: Tensor, longest: int) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q_1HKD, k_1HJD, v_1HJD))
        out_KHD = varlen_attn(q, k, v, self.start_B1, key_start_B1, max(self.spans), longest)
        return out_KHD.transpose(0, 1)[None]


class Filled:
    """All clips' tokens in one list of fixed length, (1, K, E): see ``FilledPacking``.

    frames           T of the padded batch
    fused_attention  whether norm, rotation and attention are one function, ``attend_qkv``
    fused_gate       see ``FeedForward``
    """

    attends = True

    def __init__(
        self,
        packing: FilledPacking,
        clips: int,
        frames: int,
        memory: int,
        fused_attention: bool = True,
        fused_gate: bool = True,
    ):
        self.clips, self.frames, self.memory = clips, frames, memory
        self.frame_K, self.slot_K, self.target_K, self.positions, self.clip_K = packing.table_5K.unbind()
        self.start_S = packing.start_S
        self.is_frame_K1 = (self.target_K < clips * frames)[:, None]
        self.owner_BK = torch.arange(clips, device=self.clip_K.device)[:, None] == self.clip_K
        # Attention's output is undefined for the filling's tokens.
        self.is_clips_K = torch.arange(self.clip_K.numel(), device=self.clip_K.device) < self.start_S[clips]
        # The filling attends to the last clip's context.
        self.context_start_B1 = torch.cat([self.start_S[:clips], self.start_S[-1:]])
        self.attend_qkv = self._attend_qkv if fused_attention else None
        self.fused_gate = fused_gate

    def take(self, x_BTC: Tensor) -> Tensor:
        rows = x_BTC.expand(self.clips, self.frames, -1).flatten(0, 1).index_select(0, self.frame_K)
        return torch.where(self.is_frame_K1, rows, rows.new_zeros(()))[None]

    def put(self, y_1KC: Tensor) -> Tensor:
        count = self.clips * self.frames
        empty = y_1KC.new_zeros(count + 1, y_1KC.shape[-1])
        return empty.index_copy(0, self.target_K, y_1KC[0])[:count].unflatten(0, (self.clips, self.frames))

    def with_memory(self, memory_ME: Tensor, x_1KE: Tensor) -> Tensor:
        return torch.where(self.is_frame_K1, x_1KE, memory_ME.index_select(0, self.slot_K))

    def without_memory(self, h_1KE: Tensor) -> Tensor:
        # ``put`` drops these tokens.
        return h_1KE

    def modulate(self, h_1KE: Tensor, scale_BE: Tensor, shift_BE: Tensor) -> Tensor:
        if self.clips == 1:
            return torch.addcmul(shift_BE, h_1KE, scale_BE)
        return add_scaled(shift_BE, h_1KE, scale_BE, self.clip_K, self.owner_BK)

    def add_gated(self, h_1KE: Tensor, gate_BE: Tensor, branch_1KE: Tensor) -> Tensor:
        if self.clips == 1:
            return torch.addcmul(h_1KE, gate_BE, branch_1KE)
        return add_scaled(h_1KE, branch_1KE, gate_BE, self.clip_K, self.owner_BK)

    def add_to_frames(self, h_1KE: Tensor, local_1KE: Tensor) -> Tensor:
        """local: a row per token, or one row that stands for all frames."""
        return h_1KE + torch.where(self.is_frame_K1, local_1KE, local_1KE.new_zeros(()))

    def _attend_qkv(self, qkv_1KSHD: Tensor, q_norm: RMSNorm, k_norm: RMSNorm, rotary) -> Tensor:
        """``attend_pairs`` of the packed projection, including norm and rotation; rotary as for ``SelfAttention``."""
        norm = HeadNorm(q_norm.gamma, k_norm.gamma, q_norm.eps, *rotary)
        # squeeze, not [0]: the gradient of an index is copied.
        out_KHD = self_attention(qkv_1KSHD.squeeze(0), norm, self.is_clips_K, self.start_S)
        return _OfClips.apply(out_KHD, self.is_clips_K[:, None, None]).flatten(1)[None]

    def attend_pairs(self, q_1KPHD: Tensor, k_1KPHD: Tensor, v_1K1HD: Tensor) -> Tensor:
        is_clips = self.is_clips_K[:, None, None, None]
        q, k, v = (_GradientsOfClips.apply(x[0], is_clips) for x in (q_1KPHD, k_1KPHD, v_1K1HD))
        out_KHD = varlen_attention(q, k, v[:, 0], self.start_S, self.start_S)
        return _OfClips.apply(out_KHD, self.is_clips_K[:, None, None]).flatten(1)[None]

    def attend_pairs_to_context(self, q_1KPHD: Tensor, k_BSPHD: Tensor, v_BS1HD: Tensor) -> Tensor:
        tokens = k_BSPHD.shape[1]
        starts = torch.arange(0, self.clips * tokens + 1, tokens, device=self.start_S.device, dtype=torch.int32)
        k_JPHD, v_J1HD = k_BSPHD.flatten(0, 1), v_BS1HD.flatten(0, 1)
        out_KHD = varlen_attention(q_1KPHD[0], k_JPHD, v_J1HD[:, 0], self.context_start_B1, starts)
        return out_KHD.flatten(1)[None]


class _OfClips(torch.autograd.Function):
    """Attention's output for the clips' tokens, zeros for the filling's."""

    @staticmethod
    def forward(ctx, out_KHD, is_clips_K11):
        ctx.save_for_backward(is_clips_K11)
        return torch.where(is_clips_K11, out_KHD, out_KHD.new_zeros(()))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_KHD):
        if has_kernel(grad_KHD):
            # Attention's kernels ignore gradients behind the clips' end, so masking them would be wasted.
            return grad_KHD, None
        (is_clips_K11,) = ctx.saved_tensors
        return torch.where(is_clips_K11, grad_KHD, grad_KHD.new_zeros(())), None


class _GradientsOfClips(torch.autograd.Function):
    """The identity, with zero gradients for the filling's tokens."""

    @staticmethod
    def forward(ctx, x_KPHD, is_clips_K111):
        ctx.save_for_backward(is_clips_K111)
        return x_KPHD.view_as(x_KPHD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_KPHD):
        (is_clips_K111,) = ctx.saved_tensors
        return torch.where(is_clips_K111, grad_KPHD, grad_KPHD.new_zeros(())), None


def _takes_unequal_lengths(q: Tensor) -> bool:
    """Whether one flash kernel serves clips of unequal length; elsewhere each clip is a separate call."""
    return q.is_cuda and q.dtype.itemsize == 2 and torch.backends.cuda.is_flash_attention_available()


def _joined(outputs_1HND: list[Tensor]) -> Tensor:
    # Concatenated with tokens before heads, the layout of the fused kernels' output, so that blocks are copied whole.
    return torch.cat([out.transpose(1, 2) for out in outputs_1HND], dim=1).transpose(1, 2)
