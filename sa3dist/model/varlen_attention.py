"""Attention over clips of unequal length in one list of tokens, as one operator that is opaque to torch.compile.

Where clips begin is read on the device, so one recorded or compiled program serves all lengths. On CUDA in 16 bit it
is torch's flash attention or, for one clip alone, cuDNN's: on an H100 that takes two thirds of the time (a call of 24
heads over 4155 tokens, forward and backward: 0.99 ms against 1.51), but a bias that keeps a clip apart from its filling
makes it the slower one (1.9 ms).

Legend: K query tokens, J key tokens of all clips, H heads, D head width, S clips.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@torch.library.custom_op("sa3dist::varlen_attention", mutates_args=())
def _varlen_attention(
    q_KHD: Tensor, k_JHD: Tensor, v_JHD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (K, H, D) and the log of the softmax' sums (H, K), float32."""
    if not _has_kernel(q_KHD):
        q, k, v = (_heads_first(x) for x in (q_KHD, k_JHD, v_JHD))
        scores = _scores(q, k, q_start_S1, k_start_S1)
        out = _tokens_first(torch.softmax(scores, -1).to(v.dtype) @ v)
        return out.contiguous(), scores.logsumexp(-1)[0].contiguous()
    if _one_clip(q_start_S1, k_start_S1):
        q, k, v = (_heads_first(x) for x in (q_KHD, k_JHD, v_JHD))
        out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
        return _tokens_first(out).contiguous(), sums.reshape(q_KHD.shape[1], -1).contiguous()
    lengths = q_KHD.shape[0], k_JHD.shape[0]
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        q_KHD, k_JHD, v_JHD, q_start_S1, k_start_S1, *lengths, 0.0, False, return_debug_mask=False
    )
    return out.contiguous(), sums.contiguous()


@_varlen_attention.register_fake
def _(q_KHD, k_JHD, v_JHD, q_start_S1, k_start_S1):
    tokens, heads, width = q_KHD.shape
    return q_KHD.new_empty(tokens, heads, width), q_KHD.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("sa3dist::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    grad_KHD: Tensor,
    q_KHD: Tensor,
    k_JHD: Tensor,
    v_JHD: Tensor,
    out_KHD: Tensor,
    sums_HK: Tensor,
    q_start_S1: Tensor,
    k_start_S1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_kernel(q_KHD):
        return _math_backward(grad_KHD, q_KHD, k_JHD, v_JHD, out_KHD, sums_HK, q_start_S1, k_start_S1)
    # No dropout: nothing of a generator's state is read.
    if _one_clip(q_start_S1, k_start_S1):
        given = [_heads_first(x) for x in (grad_KHD, q_KHD, k_JHD, v_JHD, out_KHD)]
        state, lengths = _no_state(q_KHD.device, torch.int64), (q_KHD.shape[0], k_JHD.shape[0])
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *given, sums_HK[None, ..., None], state, state, None, None, None, *lengths, 0.0, False
        )
        return tuple(_tokens_first(value).contiguous() for value in found)
    starts, lengths = (q_start_S1, k_start_S1), (q_KHD.shape[0], k_JHD.shape[0])
    state = _no_state(q_KHD.device, torch.uint64)
    found = torch.ops.aten._flash_attention_backward(
        grad_KHD.contiguous(), q_KHD, k_JHD, v_JHD, out_KHD, sums_HK, *starts, *lengths, 0.0, False, state, state
    )
    return tuple(value.contiguous() for value in found)


@_varlen_attention_backward.register_fake
def _(grad_KHD, q_KHD, k_JHD, v_JHD, out_KHD, sums_HK, q_start_S1, k_start_S1):
    return tuple(x.new_empty(x.shape) for x in (q_KHD, k_JHD, v_JHD))


def _setup(ctx, inputs, output):
    q, k, v, q_start, k_start = inputs
    ctx.save_for_backward(q, k, v, *output, q_start, k_start)


def _backward(ctx, grad_KHD, _):
    q, k, v, out, sums, q_start, k_start = ctx.saved_tensors
    return *_varlen_attention_backward(grad_KHD, q, k, v, out, sums, q_start, k_start), None, None


_varlen_attention.register_autograd(_backward, setup_context=_setup)


def varlen_attention(q_KHD: Tensor, k_JHD: Tensor, v_JHD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor) -> Tensor:
    """Attention of every clip's queries to its own keys, (K, H, D); scale 1 / sqrt(D).

    q_start_S1, k_start_S1   int32, on the device: where each clip's queries and keys begin, and where the last ends.
                             A clip may be empty on both sides.
    """
    return _varlen_attention(q_KHD, k_JHD, v_JHD, q_start_S1, k_start_S1)[0]


def _one_clip(q_start_S1: Tensor, k_start_S1: Tensor) -> bool:
    return q_start_S1.numel() == k_start_S1.numel() == 2


def _has_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype.itemsize == 2


@functools.cache
def _no_state(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(2 if dtype == torch.uint64 else (), dtype=dtype, device=device)


def _heads_first(x_KHD: Tensor) -> Tensor:
    return x_KHD.transpose(0, 1)[None]


def _tokens_first(x_1HKD: Tensor) -> Tensor:
    return x_1HKD[0].transpose(0, 1)


def _owners(start_S1: Tensor, tokens: int) -> Tensor:
    places = torch.arange(tokens, device=start_S1.device, dtype=start_S1.dtype)
    return torch.searchsorted(start_S1, places, right=True)


def _scores(q_1HKD: Tensor, k_1HJD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor) -> Tensor:
    """Scaled scores (1, H, K, J) in float32 or wider, -inf where query and key are of different clips."""
    wide = torch.promote_types(q_1HKD.dtype, torch.float32)
    owner_K, owner_J = _owners(q_start_S1, q_1HKD.shape[2]), _owners(k_start_S1, k_1HJD.shape[2])
    scores = q_1HKD.to(wide) @ k_1HJD.to(wide).transpose(-1, -2) * q_1HKD.shape[-1] ** -0.5
    return scores.masked_fill(owner_K[:, None] != owner_J, float("-inf"))


def _math_backward(grad, q, k, v, out, sums, q_start, k_start):
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_, q_, k_, v_, out_ = (_heads_first(x).to(wide) for x in (grad, q, k, v, out))
    weights = torch.exp(_scores(q_, k_, q_start, k_start) - sums[None, ..., None])
    through = grad_ @ v_.transpose(-1, -2) - (grad_ * out_).sum(-1, keepdim=True)
    score_grad = weights * through * q.shape[-1] ** -0.5
    found = score_grad @ k_, score_grad.transpose(-1, -2) @ q_, weights.transpose(-1, -2) @ grad_
    return tuple(_tokens_first(x).to(q.dtype).contiguous() for x in found)
