"""Self-attention from the packed projection on: norm and rotation of queries and keys, attention, and its gradient.

On a GPU one kernel computes queries and keys. They are not saved but recomputed in the backward pass: that saves four
times the model width per token, and moves eight times the width. The gradient is one operator, opaque to torch.compile.
It reads cuDNN's gradients in whatever layout they have, and makes the projection's gradient in one pass
(``qkv_gradient``). The compiler would copy the values' gradient and run two kernels with float32 values between them.

Legend: K tokens, S parts of the projection, P members of a pair, H heads, D head width, C clips.
"""

import functools

import torch
from sa3dist_kernels.operations import define
from sa3dist_kernels.qkv_gradient import HeadNorm, qkv_gradient, qkv_gradient_reference
from sa3dist_kernels.queries_and_keys import queries_and_keys, queries_and_keys_reference
from torch import Tensor

from sa3dist.model.kernel_trial import agrees
from sa3dist.model.varlen_attention import attention_gradients, difference


def self_attention(qkv_KSHD: Tensor, norm: HeadNorm, is_clips_K: Tensor, start_C1: Tensor) -> Tensor:
    """Attention within each clip, (K, H, D); for a differential pair the first member's minus the second's.

    qkv_KSHD     rows of the projection: q, k, v and, of a pair, the second member's q and k
    is_clips_K   bool: False for tokens of a filling. Their output is undefined, even NaN; if ``has_kernel``, their
                 output gradient may be too
    start_C1     see ``varlen_attention``
    """
    gammas = norm.gamma_q_D.to(qkv_KSHD.dtype), norm.gamma_k_D.to(qkv_KSHD.dtype)
    return _SelfAttention.apply(qkv_KSHD, *gammas, norm.cos_KD, norm.sin_KD, is_clips_K, start_C1, norm.eps, norm.half)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_KSHD, gamma_q_D, gamma_k_D, cos_KD, sin_KD, is_clips_K, start_C1, eps, half):
        q, k = torch.ops.sa3dist.queries_and_keys(qkv_KSHD, gamma_q_D, gamma_k_D, cos_KD, sin_KD, eps, half)
        out, lse = torch.ops.sa3dist.varlen_attention(q, k, qkv_KSHD[:, 2], start_C1, start_C1)
        ctx.save_for_backward(qkv_KSHD, out, lse, gamma_q_D, gamma_k_D, cos_KD, sin_KD, is_clips_K, start_C1)
        ctx.eps, ctx.half = eps, half
        return difference(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_KHD):
        grad = torch.ops.sa3dist.self_attention_gradient(grad_KHD, *ctx.saved_tensors, ctx.eps, ctx.half)
        return grad, *[None] * 8


def _gradient(
    grad_KHD, qkv_KSHD, out_KPHD, lse_PHK, gamma_q_D, gamma_k_D, cos_KD, sin_KD, is_clips_K, start_C1, eps: float,
    half: int,
) -> Tensor:  # fmt: skip
    norm = HeadNorm(gamma_q_D, gamma_k_D, eps, cos_KD, sin_KD, half)
    q, k = queries_and_keys(qkv_KSHD, norm)
    grads = attention_gradients(grad_KHD, q, k, qkv_KSHD[:, 2], out_KPHD, lse_PHK, start_C1, start_C1)
    return qkv_gradient(grads, qkv_KSHD, norm, is_clips_K)


def _gradient_shape(grad_KHD, qkv_KSHD, *_) -> Tensor:
    return qkv_KSHD.new_empty(qkv_KSHD.shape)


define(
    "self_attention_gradient(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor gamma_q, Tensor gamma_k, "
    "Tensor cos, Tensor sin, Tensor is_clips, Tensor start, float eps, int half) -> Tensor",
    _gradient,
    _gradient_shape,
)


def _queries_and_keys(qkv_KSHD, gamma_q_D, gamma_k_D, cos_KD, sin_KD, eps: float, half: int) -> tuple[Tensor, Tensor]:
    return queries_and_keys(qkv_KSHD, HeadNorm(gamma_q_D, gamma_k_D, eps, cos_KD, sin_KD, half))


def _queries_and_keys_shapes(qkv_KSHD, *_) -> tuple[Tensor, Tensor]:
    K, S, H, D = qkv_KSHD.shape
    return qkv_KSHD.new_empty(K, S // 2, H, D), qkv_KSHD.new_empty(K, S // 2, H, D)


define(
    "queries_and_keys(Tensor qkv, Tensor gamma_q, Tensor gamma_k, Tensor cos, Tensor sin, float eps, int half)"
    " -> (Tensor, Tensor)",
    _queries_and_keys,
    _queries_and_keys_shapes,
)


@functools.cache
def kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on ``device`` and agree with torch; if not, the reason is logged.

    True on a CPU, where torch computes them.
    """
    if device.type == "cpu":
        return True
    draw = torch.Generator().manual_seed(0)
    K, P, H, D, half = 19, 2, 3, 64, 16
    random = functools.partial(torch.randn, generator=draw)
    grads = tuple(random(K, P, H, D).to(device, dtype) for _ in range(3))
    norm = HeadNorm(
        *(random(D).to(device, dtype) for _ in range(2)), 1e-6, *(random(K, D).to(device) for _ in range(2)), half
    )
    x, is_clips = random(K, 2 * P + 1, H, D).to(device, dtype), torch.arange(K, device=device) < K - 2
    return agrees(
        "queries and keys, and their gradients",
        lambda: [*queries_and_keys(x, norm), qkv_gradient(grads, x, norm, is_clips)],
        lambda: [*queries_and_keys_reference(x, norm), qkv_gradient_reference(grads, x, norm, is_clips)],
    )
