"""Attention over clips of unequal length in one list of tokens, as one operator that is opaque to torch.compile.

Clip starts are read on the device, so one recorded or compiled program serves all lengths. On CUDA in 16 bits it is
cuDNN's attention for one clip, with or without a filling, and torch's flash attention for several. Both members of a
differential pair, which share their values, are one call: at 30 s of audio, one member would leave a third of an H100
idle. Forward and backward of such a call, 4155 tokens, 455 of them filling: cuDNN 1.56 ms, flash 2.35 ms.

Legend: K query tokens, J key tokens of all clips, P members of a pair (1 or 2), H heads, D head width, S clips.
"""

import functools

import torch
from sa3dist_kernels.operations import define
from torch import Tensor

from sa3dist.model.cudnn_attention import cudnn_attention


def _attend(
    q_KPHD: Tensor, k_JPHD: Tensor, v_JHD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (K, P, H, D) and the log-sum-exp of the scores (P, H, K), float32; undefined for a filling.

    All results of both passes are contiguous: compiled programs assume it without a check.
    """
    K, P, H, D = q_KPHD.shape
    v_JPHD = v_JHD[:, None].expand(-1, P, -1, -1)
    q, k, v = (_heads_first(x) for x in (q_KPHD, k_JPHD, v_JPHD))
    if not has_kernel(q_KPHD):
        scores = _scores(q, k, q_start_S1, k_start_S1)
        out = _tokens_first(torch.softmax(scores, -1).to(v.dtype) @ v)
        return out.contiguous(), scores.logsumexp(-1).contiguous()
    if _is_single_clip(q, k, v, q_start_S1):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
        return _tokens_first(out).contiguous(), lse.reshape(P, H, K).contiguous()
    if padded := _cudnn_padded(q, k, v, q_start_S1, k_start_S1):
        out, lse = padded.forward(q, k, v, _length(q_start_S1))
        return _tokens_first(out).contiguous(), lse.reshape(P, H, K)
    flat = [x.flatten(1, 2) for x in (q_KPHD, k_JPHD, v_JPHD)]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *flat, q_start_S1, k_start_S1, K, len(k_JPHD), 0.0, False, return_debug_mask=False
    )
    return out.reshape(K, P, H, D).contiguous(), lse.reshape(P, H, K).contiguous()


def _attend_shapes(q_KPHD, k_JPHD, v_JHD, q_start_S1, k_start_S1):
    K, P, H, D = q_KPHD.shape
    return q_KPHD.new_empty(K, P, H, D), q_KPHD.new_empty(P, H, K, dtype=torch.float32)


def _attend_backward(*operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(gradient.contiguous() for gradient in attention_gradients(*operands))


def attention_gradients(
    grad_KHD: Tensor,
    q_KPHD: Tensor,
    k_JPHD: Tensor,
    v_JHD: Tensor,
    out_KPHD: Tensor,
    lse_PHK: Tensor,
    q_start_S1: Tensor,
    k_start_S1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, of keys, and of the values per member (J, P, H, D), in any layout.

    The output gradient is applied to all members with the same sign. The second member's output is subtracted, so the
    caller negates its gradients.
    """
    starts, lengths, P = (q_start_S1, k_start_S1), (len(q_KPHD), len(k_JPHD)), q_KPHD.shape[1]
    v_JPHD = v_JHD[:, None].expand(-1, P, -1, -1)
    grad_KPHD = grad_KHD[:, None].expand(-1, P, -1, -1)
    if not has_kernel(q_KPHD):
        return _math_backward(grad_KPHD, q_KPHD, k_JPHD, v_JPHD, out_KPHD, lse_PHK, *starts)
    q, k, v, out = (_heads_first(x) for x in (q_KPHD, k_JPHD, v_JPHD, out_KPHD))
    single = _is_single_clip(q, k, v, q_start_S1)
    if attention := cudnn_attention(q, k, v, False) if single else _cudnn_padded(q, k, v, *starts):
        grad = _heads_first(grad_KHD.contiguous()[:, None].expand(-1, P, -1, -1))
        operands = grad, q, k, v, out, lse_PHK[..., None]
        gradients = attention.backward(*operands, None if single else _length(q_start_S1))
        return tuple(_tokens_first(value) for value in gradients)
    # Torch has no kernel that reads one gradient for both members.
    grad_KPHD = grad_KPHD.contiguous()
    # Without dropout the generator's state is not read.
    if single:
        state, lse = _no_state(q.device, torch.int64), lse_PHK[..., None]
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _heads_first(grad_KPHD), q, k, v, out, lse, state, state, None, None, None, *lengths, 0.0, False
        )
        return tuple(_tokens_first(value) for value in gradients)
    operands = [x.flatten(1, 2) for x in (grad_KPHD, q_KPHD, k_JPHD, v_JPHD, out_KPHD)]
    state = _no_state(q.device, torch.uint64)
    gradients = torch.ops.aten._flash_attention_backward(
        *operands, lse_PHK.flatten(0, 1), *starts, *lengths, 0.0, False, state, state
    )
    return tuple(value.unflatten(1, (P, -1)) for value in gradients)


def _attend_backward_shapes(grad_KHD, q_KPHD, k_JPHD, v_JHD, out_KPHD, lse_PHK, q_start_S1, k_start_S1):
    return tuple(x.new_empty(x.shape) for x in (q_KPHD, k_JPHD, k_JPHD))


define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor q_start, Tensor k_start) -> (Tensor, Tensor)",
    _attend,
    _attend_shapes,
)
define(
    "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor q_start,"
    " Tensor k_start) -> (Tensor, Tensor, Tensor)",
    _attend_backward,
    _attend_backward_shapes,
)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_start, k_start):
        out, lse = torch.ops.sa3dist.varlen_attention(q, k, v, q_start, k_start)
        ctx.save_for_backward(q, k, v, out, lse, q_start, k_start)
        return difference(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_KHD):
        grad_q, grad_k, grad_v = torch.ops.sa3dist.varlen_attention_backward(grad_KHD, *ctx.saved_tensors)
        # Outside the operator, so that the compiler fuses it with what reads the gradients.
        signs_P11 = (1 - 2 * torch.arange(grad_q.shape[1], device=grad_KHD.device))[:, None, None]
        grad_q, grad_k = (value * signs_P11.to(value.dtype) for value in (grad_q, grad_k))
        return grad_q, grad_k, difference(grad_v), None, None


def varlen_attention(q_KPHD: Tensor, k_JPHD: Tensor, v_JHD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor) -> Tensor:
    """Attention of each clip's queries to its own keys, (K, H, D), with scale 1 / sqrt(D).

    For a differential pair it is the first member's attention minus the second's.

    v_JHD                    values, shared by the members
    q_start_S1, k_start_S1   int32, on the device: where each clip's queries and keys begin, and where the last ones
                             end. A clip may be empty on both sides. The second of two clips is a filling: its output is
                             undefined, even NaN; if ``has_kernel``, its output gradient may be too
    """
    return _VarlenAttention.apply(q_KPHD, k_JPHD, v_JHD, q_start_S1, k_start_S1)


def difference(x_KPHD: Tensor) -> Tensor:
    """The first member of a pair minus the second, or the only one; (K, H, D)."""
    first_KHD, *second = x_KPHD.unbind(1)
    return first_KHD - second[0] if second else first_KHD


def _clips(start_S1: Tensor) -> int:
    """Number of clips in the list, including a filling."""
    return start_S1.numel() - 1


def _is_single_clip(q, k, v, q_start_S1: Tensor) -> bool:
    """Whether this is one clip without a filling, for cuDNN.

    According to torch, cuDNN's backward pass is not deterministic when called through torch. A deterministic run
    therefore needs NVIDIA's package for it.
    """
    exact = torch.are_deterministic_algorithms_enabled()
    return _clips(q_start_S1) == 1 and (not exact or cudnn_attention(q, k, v, False) is not None)


def _cudnn_padded(q, k, v, q_start_S1: Tensor, k_start_S1: Tensor):
    """cuDNN's kernels for self-attention of one clip and a filling; None for other cases, or if unavailable."""
    is_self = q_start_S1 is k_start_S1 or q_start_S1.data_ptr() == k_start_S1.data_ptr()
    return cudnn_attention(q, k, v, True) if is_self and _clips(q_start_S1) == 2 else None


def _length(start_S1: Tensor) -> Tensor:
    return start_S1[1:2]


def has_kernel(q: Tensor) -> bool:
    """Whether a fused kernel computes this attention, rather than ``_scores`` with whole matrices."""
    return q.is_cuda and q.dtype.itemsize == 2


@functools.cache
def _no_state(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(2 if dtype == torch.uint64 else (), dtype=dtype, device=device)


def _heads_first(x_KPHD: Tensor) -> Tensor:
    return x_KPHD.permute(1, 2, 0, 3)


def _tokens_first(x_PHKD: Tensor) -> Tensor:
    return x_PHKD.permute(2, 0, 1, 3)


def _owners(start_S1: Tensor, tokens: int) -> Tensor:
    positions = torch.arange(tokens, device=start_S1.device, dtype=start_S1.dtype)
    return torch.searchsorted(start_S1, positions, right=True)


def _scores(q_PHKD: Tensor, k_PHJD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor) -> Tensor:
    """Scaled scores (P, H, K, J) in float32 or wider; -inf where query and key belong to different clips."""
    wide = torch.promote_types(q_PHKD.dtype, torch.float32)
    owner_K, owner_J = _owners(q_start_S1, q_PHKD.shape[2]), _owners(k_start_S1, k_PHJD.shape[2])
    scores = q_PHKD.to(wide) @ k_PHJD.to(wide).transpose(-1, -2) * q_PHKD.shape[-1] ** -0.5
    return scores.masked_fill(owner_K[:, None] != owner_J, float("-inf"))


def _math_backward(grad, q, k, v, out, lse, q_start, k_start):
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_, q_, k_, v_, out_ = (_heads_first(x).to(wide) for x in (grad, q, k, v, out))
    weights = torch.exp(_scores(q_, k_, q_start, k_start) - lse[..., None])
    grad_weights = grad_ @ v_.transpose(-1, -2) - (grad_ * out_).sum(-1, keepdim=True)
    grad_scores = weights * grad_weights * q.shape[-1] ** -0.5
    gradients = grad_scores @ k_, grad_scores.transpose(-1, -2) @ q_, weights.transpose(-1, -2) @ grad_
    return tuple(_tokens_first(x).to(q.dtype) for x in gradients)
