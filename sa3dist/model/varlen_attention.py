"""Attention over clips of unequal length in one list of tokens, as one operation that the compiler does not look into.

Where clips begin is read on the device, so one recorded or compiled program serves all lengths.

Legend: K query tokens, J key tokens of all clips, H heads, D head width, S clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Which library computes it on CUDA: "flash" (torch's own flash attention) or "cudnn".
CUDA_BACKEND = "flash"


@torch.library.custom_op("sa3dist::varlen_attention", mutates_args=())
def _varlen_attention(
    q_KHD: Tensor, k_JHD: Tensor, v_JHD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (K, H, D) and the log of the softmax' sums (H, K), float32."""
    if not _has_kernel(q_KHD):
        q, k, v = (x.transpose(0, 1)[None] for x in (q_KHD, k_JHD, v_JHD))
        scores = _scores(q, k, q_start_S1, k_start_S1)
        sums = scores.logsumexp(-1)
        out = torch.softmax(scores, -1).to(v.dtype) @ v
        return out[0].transpose(0, 1).contiguous(), sums[0].contiguous()
    lengths = q_KHD.shape[0], k_JHD.shape[0]
    starts = q_start_S1, k_start_S1
    if CUDA_BACKEND == "cudnn":
        out, sums, *_ = torch.ops.aten._cudnn_attention_forward(
            q_KHD, k_JHD, v_JHD, None, *starts, *lengths, True, 0.0, False, False
        )
    else:
        out, sums, *_ = torch.ops.aten._flash_attention_forward(
            q_KHD, k_JHD, v_JHD, *starts, *lengths, 0.0, False, return_debug_mask=False
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
    lengths = q_KHD.shape[0], k_JHD.shape[0]
    starts = q_start_S1, k_start_S1
    given = grad_KHD.contiguous(), q_KHD, k_JHD, v_JHD, out_KHD, sums_HK
    # No dropout: neither state of a generator is read.
    state = torch.zeros(2, dtype=torch.uint64, device=q_KHD.device)
    if CUDA_BACKEND == "cudnn":
        found = torch.ops.aten._cudnn_attention_backward(*given, state, None, None, *starts, *lengths, 0.0, False)
    else:
        unused = torch.empty(0, dtype=torch.uint64, device=q_KHD.device)
        found = torch.ops.aten._flash_attention_backward(*given, *starts, *lengths, 0.0, False, state, unused)
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


def _has_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype.itemsize == 2


def _scores(q_1HKD: Tensor, k_1HJD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor) -> Tensor:
    """Scaled scores (1, H, K, J) in float32 or wider, -inf where query and key are of different clips."""
    wide = torch.promote_types(q_1HKD.dtype, torch.float32)
    owner_K, owner_J = (
        torch.searchsorted(start, torch.arange(count, device=start.device, dtype=start.dtype), right=True)
        for start, count in ((q_start_S1, q_1HKD.shape[2]), (k_start_S1, k_1HJD.shape[2]))
    )
    scores = q_1HKD.to(wide) @ k_1HJD.to(wide).transpose(-1, -2) * q_1HKD.shape[-1] ** -0.5
    return scores.masked_fill(owner_K[:, None] != owner_J, float("-inf"))


def _math_backward(grad, q, k, v, out, sums, q_start, k_start):
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_, q_, k_, v_, out_ = (x.transpose(0, 1)[None].to(wide) for x in (grad, q, k, v, out))
    weights = torch.exp(_scores(q_, k_, q_start, k_start) - sums[None, ..., None])
    through = grad_ @ v_.transpose(-1, -2) - (grad_ * out_).sum(-1, keepdim=True)
    score_grad = weights * through * q.shape[-1] ** -0.5
    found = score_grad @ k_, score_grad.transpose(-1, -2) @ q_, weights.transpose(-1, -2) @ grad_
    return tuple(x[0].transpose(0, 1).to(q.dtype).contiguous() for x in found)
