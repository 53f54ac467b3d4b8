"""The gradient of a SiLU gate in Triton's interpreter, against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.layer_cases import relative_error

pytest.importorskip("triton")
from sa3dist_kernels import triton_support  # noqa: E402
from sa3dist_kernels.gate_gradient import BLOCK_G, gate_gradient  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not triton_support.interpreting(), reason="Triton was imported without its interpreter"
)
IMPLS = ["torch", pytest.param("triton", marks=needs_interpreter)]


def case(tokens, channels, dtype):
    draw = torch.Generator().manual_seed(tokens + channels)
    dy, z, bias = (torch.randn(shape, generator=draw) for shape in ((tokens, channels), (tokens, 2 * channels), ()))
    bias = bias.expand(2 * channels) + torch.arange(2 * channels) / channels
    if tokens:
        # Gates far open and far closed, and a row of zeros.
        z[0, channels::2], z[0, channels + 1 :: 2], z[-1] = 60, -60, 0
    return dy.to(dtype), z.to(dtype), bias.to(dtype)


def by_autograd(dy, z, bias):
    z = z.double().requires_grad_()
    value, gate = (z if bias is None else z + bias.double()).chunk(2, dim=-1)
    y = value * F.silu(gate)
    return torch.autograd.grad(y, z, dy.double())[0], y.detach()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("tokens", "channels"), [(6, BLOCK_G), (4, 37), (1, BLOCK_G + 8)])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_gradient_and_values_are_autograds(impl, dtype, tokens, channels, with_bias):
    dy, z, bias = case(tokens, channels, dtype)
    bias = bias if with_bias else None
    found = gate_gradient(dy, z, bias, values=True, impl=impl)
    for ours, exact in zip(found, by_autograd(dy, z, bias), strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert relative_error(ours.double(), exact) < 2 * torch.finfo(dtype).eps
    alone, nothing = gate_gradient(dy, z, bias, values=False, impl=impl)
    assert torch.equal(alone, found[0])
    assert nothing is None


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_give_nothing_and_strided_operands_the_contiguous_ones_bits(impl):
    dz, y = gate_gradient(*case(0, 24, torch.float32), values=True, impl=impl)
    assert (dz.shape, y.shape) == ((0, 48), (0, 24))
    dy, z, bias = case(5, 24, torch.float32)
    expected = gate_gradient(dy, z, bias, values=True, impl=impl)
    strided = dy.t().contiguous().t(), z.repeat_interleave(2, dim=1)[:, ::2], bias
    assert all(map(torch.equal, gate_gradient(*strided, values=True, impl=impl), expected))
