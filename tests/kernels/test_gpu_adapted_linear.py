"""The adapted layer on CUDA in every format: no further from float64 than the materialised weight in that format."""

import pytest
import torch
import torch.nn.functional as F
from sa3dist_kernels import ADAPTER_TYPES, adapted_linear, effective_weight_reference, frozen_constants

pytestmark = pytest.mark.gpu

# tokens, fan_out, fan_in, rank: odd ones, a single token, and a layer with more inputs than outputs.
SIZES = {"odd": (77, 330, 258, 7), "one-token": (1, 64, 96, 16), "wide": (323, 256, 1024, 16)}
# Room for a form that rounds at other places and, in units of the format's precision, where the other form hardly errs.
SMALL_FACTOR = 1.5
ROUNDINGS = {torch.float32: 8.0, torch.float16: 0.5, torch.bfloat16: 0.5}


@pytest.fixture(params=["torch", "triton"])
def impl(request, device) -> str:
    """Both forms by name: the factored one, and W' formed per use."""
    if request.param == "triton" and device.type != "cuda":
        pytest.skip("in the interpreter the kernels have tests of their own")
    return request.param


@pytest.fixture(autouse=True)
def _exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make_layer(kind, tokens, fan_out, fan_in, rank, dtype):
    """Weight, bias, bases, parameters, input and output gradient, as a trained layer has them, rounded to ``dtype``."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    weight = (normal(fan_out, fan_in) / fan_in**0.5).to(dtype)
    bases = [torch.linalg.qr(normal(side, rank))[0] for side in (fan_out, fan_in)] if kind.xs else []
    norms = {kind.row_magnitude: weight.double().norm(dim=1), kind.col_magnitude: weight.double().norm(dim=0)}
    params = {
        name: norms[name] * (1 + 0.1 * normal(*shape)) if name in norms else normal(*shape) / shape[-1] ** 0.5
        for name, shape in kind.parameter_shapes(fan_out, fan_in, rank).items()
    }
    params = {name: value.float() for name, value in params.items()}
    x, grad, bias = (value.to(dtype) for value in (normal(tokens, fan_in), normal(tokens, fan_out), normal(fan_out)))
    return weight, bias, [base.float() for base in bases], params, x, grad


def evaluate(form, kind, layer, device, wide=None):
    """Output and every gradient by name, float64 on the CPU. ``wide``: convert everything to this format first."""
    moved = [value.to(device, wide or value.dtype) for value in (layer[0], layer[1], *layer[2], layer[4], layer[5])]
    weight, bias, *bases, x, grad = moved
    params = {name: value.to(device, wide or value.dtype).requires_grad_() for name, value in layer[3].items()}
    x.requires_grad_()
    y = form(x, weight, bias, params, kind, 0.7, frozen_constants(weight, *bases))
    names = ["y", "x", *params]
    values = [y, *torch.autograd.grad(y, [x, *params.values()], grad)]
    return {name: value.detach().double().cpu() for name, value in zip(names, values, strict=True)}


def adapted(impl):
    def form(x, weight, bias, params, kind, scale, frozen):
        return adapted_linear(x, weight, bias, params, kind, scale, frozen=frozen, impl=impl)

    return form


def materialised(x, weight, bias, params, kind, scale, frozen):
    merged = effective_weight_reference(weight, params, kind, scale, frozen)
    return F.linear(x, merged.to(x.dtype), bias)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", list(ROUNDINGS), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ADAPTER_TYPES)
def test_either_form_is_no_further_from_float64_than_the_materialised(
    device, name, dtype, sizes, impl, record_property
):
    kind = ADAPTER_TYPES[name]
    layer = make_layer(kind, *SIZES[sizes], dtype)
    exact = evaluate(materialised, kind, layer, "cpu", torch.float64)
    ours, theirs = evaluate(adapted(impl), kind, layer, device), evaluate(materialised, kind, layer, device)
    errors = {
        key: [float((found[key] - exact[key]).norm() / exact[key].norm()) for found in (ours, theirs)] for key in exact
    }
    record_property("errors_ours_and_materialised", errors)
    slack = ROUNDINGS[dtype] * torch.finfo(dtype).eps
    for key, (our_error, their_error) in errors.items():
        assert our_error <= SMALL_FACTOR * their_error + slack, f"{key}: {our_error:.1e} against {their_error:.1e}"


@pytest.mark.parametrize("name", ADAPTER_TYPES)
def test_autocast_and_empty_input_give_the_formats_they_promise(device, name, impl):
    kind = ADAPTER_TYPES[name]
    weight, bias, bases, params, x, _ = make_layer(kind, 5, 32, 48, 4, torch.bfloat16)
    frozen = frozen_constants(weight.to(device), *(base.to(device) for base in bases))
    params = {key: value.to(device).requires_grad_() for key, value in params.items()}
    with torch.autocast(device.type, torch.bfloat16):
        y = adapted(impl)(x.float().to(device), weight.to(device), bias.to(device), params, kind, 1.0, frozen)
        none = adapted(impl)(x[:0].to(device), weight.to(device), bias.to(device), params, kind, 1.0, frozen)
    assert y.dtype == torch.bfloat16
    assert none.shape == (0, 32)
    gradients = torch.autograd.grad(y.float().square().sum() + none.float().sum(), list(params.values()))
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", ADAPTER_TYPES)
def test_the_op_never_waits_for_the_device(device, name, impl):
    if device.type != "cuda":
        pytest.skip("only a CUDA device can be waited for")
    kind = ADAPTER_TYPES[name]
    layer = make_layer(kind, *SIZES["odd"], torch.bfloat16)
    weight, bias, x, grad = (value.to(device) for value in (layer[0], layer[1], layer[4], layer[5]))
    frozen = frozen_constants(weight, *(base.to(device) for base in layer[2]))
    params = {key: value.to(device).requires_grad_() for key, value in layer[3].items()}
    x.requires_grad_()

    def step():
        y = adapted(impl)(x, weight, bias, params, kind, 0.7, frozen)
        return torch.autograd.grad(y, [x, *params.values()], grad)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(gradient.isfinite().all() for gradient in gradients)
