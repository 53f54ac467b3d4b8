"""Attention over clips of unequal length in one list of tokens, as one operator that is opaque to torch.compile.

The starts of clips are read on the device, so one recorded or compiled program serves all lengths. On CUDA in 16 bits
it is cuDNN's attention for one clip, alone or followed by a filling, and torch's flash attention for several. Both
members of a differential pair share one call: at 30 s one member alone would leave a third of an H100 idle. They have
the same values. Milliseconds of such a call there, forward and backward, 4155 tokens, 455 of them filling: cuDNN 1.56,
flash 2.35.

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
    """Output (K, P, H, D) and the logarithms of the softmax sums (P, H, K), float32. A filling's may be anything.

    All results are contiguous, also those of the backward pass: compiled programs rely on it unchecked.
    """
    K, P, H, D = q_KPHD.shape
    v_JPHD = v_JHD[:, None].expand(-1, P, -1, -1)
    q, k, v = (_heads_first(x) for x in (q_KPHD, k_JPHD, v_JPHD))
    if not has_kernel(q_KPHD):
        scores = _scores(q, k, q_start_S1, k_start_S1)
        out = _tokens_first(torch.softmax(scores, -1).to(v.dtype) @ v)
        return out.contiguous(), scores.logsumexp(-1).contiguous()
    if _alone(q, k, v, q_start_S1):
        out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
        return _tokens_first(out).contiguous(), sums.reshape(P, H, K).contiguous()
    if padded := _padded(q, k, v, q_start_S1, k_start_S1):
        out, sums = padded.forward(q, k, v, _length(q_start_S1))
        return _tokens_first(out).contiguous(), sums.reshape(P, H, K)
    flat = [x.flatten(1, 2) for x in (q_KPHD, k_JPHD, v_JPHD)]
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        *flat, q_start_S1, k_start_S1, K, len(k_JPHD), 0.0, False, return_debug_mask=False
    )
    return out.reshape(K, P, H, D).contiguous(), sums.reshape(P, H, K).contiguous()


def _attend_shapes(q_KPHD, k_JPHD, v_JHD, q_start_S1, k_start_S1):
    K, P, H, D = q_KPHD.shape
    return q_KPHD.new_empty(K, P, H, D), q_KPHD.new_empty(P, H, K, dtype=torch.float32)


def _attend_backward(*given: Tensor) -> tuple[Tensor, ...]:
    return tuple(found.contiguous() for found in attention_gradients(*given))


def attention_gradients(
    grad_KHD: Tensor,
    q_KPHD: Tensor,
    k_JPHD: Tensor,
    v_JHD: Tensor,
    out_KPHD: Tensor,
    sums_PHK: Tensor,
    q_start_S1: Tensor,
    k_start_S1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, of keys, and of the values as each member of the pair sees them, (J, P, H, D).

    Computed as if every member had the incoming gradient. The second member is subtracted, so its gradients have the
    opposite sign. The layout is whatever the kernels leave.
    """
    starts, lengths, P = (q_start_S1, k_start_S1), (len(q_KPHD), len(k_JPHD)), q_KPHD.shape[1]
    v_JPHD = v_JHD[:, None].expand(-1, P, -1, -1)
    grad_KPHD = grad_KHD[:, None].expand(-1, P, -1, -1)
    if not has_kernel(q_KPHD):
        return _math_backward(grad_KPHD, q_KPHD, k_JPHD, v_JPHD, out_KPHD, sums_PHK, *starts)
    q, k, v, out = (_heads_first(x) for x in (q_KPHD, k_JPHD, v_JPHD, out_KPHD))
    alone = _alone(q, k, v, q_start_S1)
    if attention := cudnn_attention(q, k, v, False) if alone else _padded(q, k, v, *starts):
        grad = _heads_first(grad_KHD.contiguous()[:, None].expand(-1, P, -1, -1))
        given = grad, q, k, v, out, sums_PHK[..., None]
        found = attention.backward(*given, None if alone else _length(q_start_S1))
        return tuple(_tokens_first(value) for value in found)
    # torch has no kernel that reads one gradient for both members.
    grad_KPHD = grad_KPHD.contiguous()
    # Without dropout no generator state is read.
    if alone:
        state, sums = _no_state(q.device, torch.int64), sums_PHK[..., None]
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _heads_first(grad_KPHD), q, k, v, out, sums, state, state, None, None, None, *lengths, 0.0, False
        )
        return tuple(_tokens_first(value) for value in found)
    given = [x.flatten(1, 2) for x in (grad_KPHD, q_KPHD, k_JPHD, v_JPHD, out_KPHD)]
    state = _no_state(q.device, torch.uint64)
    found = torch.ops.aten._flash_attention_backward(
        *given, sums_PHK.flatten(0, 1), *starts, *lengths, 0.0, False, state, state
    )
    return tuple(value.unflatten(1, (P, -1)) for value in found)


def _attend_backward_shapes(grad_KHD, q_KPHD, k_JPHD, v_JHD, out_KPHD, sums_PHK, q_start_S1, k_start_S1):
    return tuple(x.new_empty(x.shape) for x in (q_KPHD, k_JPHD, k_JPHD))


define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor q_start, Tensor k_start) -> (Tensor, Tensor)",
    _attend,
    _attend_shapes,
)
define(
    "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, Tensor q_start,"
    " Tensor k_start) -> (Tensor, Tensor, Tensor)",
    _attend_backward,
    _attend_backward_shapes,
)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_start, k_start):
        out, sums = torch.ops.sa3dist.varlen_attention(q, k, v, q_start, k_start)
        ctx.save_for_backward(q, k, v, out, sums, q_start, k_start)
        return difference(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_KHD):
        found = torch.ops.sa3dist.varlen_attention_backward(grad_KHD, *ctx.saved_tensors)
        # Outside of the operator, so that the compiler fuses it into whatever reads the gradients.
        signs_P11 = (1 - 2 * torch.arange(found[0].shape[1], device=grad_KHD.device))[:, None, None]
        grad_q, grad_k = (value * signs_P11.to(value.dtype) for value in found[:2])
        return grad_q, grad_k, difference(found[2]), None, None


def varlen_attention(q_KPHD: Tensor, k_JPHD: Tensor, v_JHD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor) -> Tensor:
    """Attention of every clip's queries to its own keys, (K, H, D); for a pair, the first member's minus the second's.

    The scale is 1 / sqrt(D).

    v_JHD                    values, shared by the members
    q_start_S1, k_start_S1   int32, on the device: start of each clip's queries and keys, and the end of the last. A
                             clip may be empty on both sides. Of two clips the second is a filling: its output may be
                             anything, NaN included; where ``has_kernel``, so may its incoming gradient
    """
    return _VarlenAttention.apply(q_KPHD, k_JPHD, v_JHD, q_start_S1, k_start_S1)


def difference(x_KPHD: Tensor) -> Tensor:
    """The first member of a pair minus the second, or the only member; (K, H, D)."""
    first_KHD, *second = x_KPHD.unbind(1)
    return first_KHD - second[0] if second else first_KHD


def _clips(start_S1: Tensor) -> int:
    """Number of clips in the list, a filling included."""
    return start_S1.numel() - 1


def _alone(q, k, v, q_start_S1: Tensor) -> bool:
    """Whether these are one clip alone, in a form that cuDNN takes.

    torch warns that its own binding of cuDNN's backward pass does not add in a fixed order: where that is required,
    only the Python package is used.
    """
    exact = torch.are_deterministic_algorithms_enabled()
    return _clips(q_start_S1) == 1 and (not exact or cudnn_attention(q, k, v, False) is not None)


def _padded(q, k, v, q_start_S1: Tensor, k_start_S1: Tensor):
    """cuDNN's kernels for one clip followed by a filling; None for other inputs, or without such kernels."""
    own = q_start_S1 is k_start_S1 or q_start_S1.data_ptr() == k_start_S1.data_ptr()
    return cudnn_attention(q, k, v, True) if own and _clips(q_start_S1) == 2 else None


def _length(start_S1: Tensor) -> Tensor:
    return start_S1[1:2]


def has_kernel(q: Tensor) -> bool:
    """Whether a kernel computes this attention, instead of torch's products of whole matrices."""
    return q.is_cuda and q.dtype.itemsize == 2


@functools.cache
def _no_state(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(2 if dtype == torch.uint64 else (), dtype=dtype, device=device)


def _heads_first(x_KPHD: Tensor) -> Tensor:
    return x_KPHD.permute(1, 2, 0, 3)


def _tokens_first(x_PHKD: Tensor) -> Tensor:
    return x_PHKD.permute(2, 0, 1, 3)


def _owners(start_S1: Tensor, tokens: int) -> Tensor:
    places = torch.arange(tokens, device=start_S1.device, dtype=start_S1.dtype)
    return torch.searchsorted(start_S1, places, right=True)


def _scores(q_PHKD: Tensor, k_PHJD: Tensor, q_start_S1: Tensor, k_start_S1: Tensor) -> Tensor:
    """Scaled scores (P, H, K, J) in float32 or wider, -inf where query and key are of different clips."""
    wide = torch.promote_types(q_PHKD.dtype, torch.float32)
    owner_K, owner_J = _owners(q_start_S1, q_PHKD.shape[2]), _owners(k_start_S1, k_PHJD.shape[2])
    scores = q_PHKD.to(wide) @ k_PHJD.to(wide).transpose(-1, -2) * q_PHKD.shape[-1] ** -0.5
    return scores.masked_fill(owner_K[:, None] != owner_J, float("-inf"))


def _math_backward(grad, q, k, v, out, sums, q_start, k_start):
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_, q_, k_, v_, out_ = (_heads_first(x).to(wide) for x in (grad, q, k, v, out))
    weights = torch.exp(_scores(q_, k_, q_start, k_start) - sums[..., None])
    through = grad_ @ v_.transpose(-1, -2) - (grad_ * out_).sum(-1, keepdim=True)
    score_grad = weights * through * q.shape[-1] ** -0.5
    found = score_grad @ k_, score_grad.transpose(-1, -2) @ q_, weights.transpose(-1, -2) @ grad_
    return tuple(_tokens_first(x).to(q.dtype) for x in found)
