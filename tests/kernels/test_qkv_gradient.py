"""Queries and keys of the packed projection, and its gradient, in Triton's interpreter, against float64."""

import pytest
import torch
import torch.nn.functional as F

from sa3dist.model.blocks import rotate
from tests.helpers.layer_cases import relative_error

pytest.importorskip("triton")
from sa3dist_kernels import triton_support  # noqa: E402
from sa3dist_kernels.qkv_gradient import HeadNorm, qkv_gradient  # noqa: E402
from sa3dist_kernels.queries_and_keys import queries_and_keys  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not triton_support.interpreting(), reason="Triton was imported without its interpreter"
)
EPS = 1e-6


def case(pairs, tokens=11, heads=3, width=24, half=8, dtype=torch.float32):
    """Gradients of q, k and v as attention lays them out, the projection, and what turns it into q and k."""
    draw = torch.Generator().manual_seed(tokens + pairs)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    # Of v heads lie ahead of tokens, as cuDNN leaves them.
    grads = [normal(tokens, pairs, heads, width) for _ in range(2)]
    grads.append(normal(pairs, heads, tokens, width).permute(2, 0, 1, 3))
    angles = torch.rand(tokens, half, generator=draw) * 6
    rest = torch.ones(tokens, width - 2 * half)
    cos = torch.cat([angles.cos(), angles.cos(), rest], dim=1)
    sin = torch.cat([-angles.sin(), angles.sin(), 0 * rest], dim=1)
    x = normal(tokens, 2 * pairs + 1, heads, width)
    # A head that is all zeros, and one far larger than the others.
    x[1, 0, 0] = 0
    x[2] *= 100
    return tuple(grads), x, HeadNorm(normal(width), normal(width), EPS, cos, sin, half)


def in_float64(x, norm):
    return [
        rotate(F.rms_norm(x[:, part::3], gamma.shape, gamma.double(), EPS), *norm[3:])
        for part, gamma in ((0, norm.gamma_q_D), (1, norm.gamma_k_D))
    ]


def by_autograd(grads, x, norm):
    x = x.double().requires_grad_()
    made = in_float64(x, norm)
    made.append(x[:, 2:3].expand_as(grads[2]))
    # The second member's attention is taken off the first's.
    signs = torch.tensor([1, -1][: x.shape[1] // 2])[:, None, None]
    return torch.autograd.grad(made, x, [grad.double() * signs for grad in grads])[0]


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_queries_and_keys_are_normed_and_rotated_heads(pairs, impl, dtype):
    _, x, norm = case(pairs, dtype=dtype)
    found = queries_and_keys(x, norm, impl)
    for ours, exact in zip(found, in_float64(x.double(), norm), strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert relative_error(ours.double(), exact) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_gradient_is_autograds(pairs, impl, dtype):
    grads, x, norm = case(pairs, dtype=dtype)
    found = qkv_gradient(grads, x, norm, torch.ones(len(x), dtype=torch.bool), impl)
    assert found.dtype == dtype
    assert found.is_contiguous()
    exact = by_autograd(grads, x, norm)
    for part in range(x.shape[1]):
        assert relative_error(found[:, part].double(), exact[:, part]) < 4 * torch.finfo(dtype).eps, part


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_interpreter)])
def test_what_lies_behind_the_clips_is_not_read(impl):
    grads, x, norm = case(2)
    is_clips = torch.arange(len(x)) < 7
    expected = qkv_gradient(grads, x, norm, is_clips, impl)
    assert torch.equal(expected[7:], torch.zeros_like(expected[7:]))
    assert torch.equal(expected[:7], qkv_gradient(grads, x, norm, torch.ones_like(is_clips), impl)[:7])
    for grad in grads:
        grad[7:] = torch.nan
    assert torch.equal(qkv_gradient(grads, x, norm, is_clips, impl), expected)
