"""The Triton kernels on a CUDA device: every configuration that may be chosen, in every format, and compiled code."""

import json

import pytest
import torch
from layer_cases import make_layer, relative_error, values_and_gradients
from sa3dist_kernels import ADAPTER_TYPES, adapted_linear

pytest.importorskip("triton")
from sa3dist_kernels import gain_gradient, scaled_matmul, tuning, weight_pass  # noqa: E402

pytestmark = pytest.mark.gpu

# Products are rounded once on the way in (gains times values) and once on the way out.
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FORMATS = pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def _only_cuda(device, monkeypatch, tmp_path):
    if device.type != "cuda":
        pytest.skip("in the interpreter the kernels have tests of their own")
    monkeypatch.setenv(tuning.FOLDER_VARIABLE, str(tmp_path / "tuning"))
    for cached in (tuning._path, tuning._table):
        cached.cache_clear()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    for cached in (tuning._path, tuning._table):
        cached.cache_clear()


def product_arguments(device, dtype, tokens, inner, outer, rank, tail):
    """Arguments of ``scaled_matmul`` with everything on, its outputs of the order of one."""

    def normal(*shape):
        return torch.randn(shape, device=device)

    positional = (normal(tokens, inner), normal(outer, inner).t() / inner**0.5, normal(tokens, rank) / rank**0.5)
    named = {"left_gain_K": normal(inner), "out_gain_M": normal(outer), "bias_M": normal(outer).to(dtype)}
    named |= {"other_NM": normal(tokens, outer).to(dtype), "tail_TK": normal(tail, inner).to(dtype)}
    return (*(value.to(dtype) for value in positional), normal(outer, rank).t(), 0.7), named


def doubled(values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


@FORMATS
@pytest.mark.parametrize("sizes", [(5, 257, 96, 7, 3), (387, 512, 330, 16, 16), (1500, 768, 512, 128, 128)])
def test_every_configuration_is_the_reference_in_float64(device, dtype, sizes):
    arguments, named = product_arguments(device, dtype, *sizes)
    exact = dict(zip(named, doubled(named.values()), strict=True))
    expected = scaled_matmul.scaled_matmul(*doubled(arguments), impl="torch", **exact)
    for config in {
        str(c): c for c in (*scaled_matmul.candidates(1, dtype), *scaled_matmul.candidates(4096, dtype))
    }.values():
        got = scaled_matmul.scaled_matmul(*arguments, config=config, **named)
        for what, ours, theirs in zip(("out", "sums", "tail"), got, expected, strict=True):
            assert relative_error(ours.double(), theirs) < LIMITS[dtype], (config, what)


@FORMATS
def test_gain_gradient_is_exact_where_the_output_has_lost_the_product(device, dtype):
    (*product, alpha), named = product_arguments(device, dtype, 387, 512, 330, 16, 1)
    gain, bias = named["out_gain_M"], named["bias_M"]
    gain[3], gain[200], bias[5], bias[317] = 0, 1e-5, 300, 5000
    exact = scaled_matmul.scaled_matmul(*doubled(product), alpha, impl="torch")[0]
    y = (gain.double() * exact + bias.double()).to(dtype)
    grad = torch.randn(387, 330, device=device).to(dtype)
    got = gain_gradient.gain_gradient(grad, y, gain, bias, *product, alpha)
    terms = grad.double() * exact
    assert float(((got.double() - terms.sum(0)).abs() / terms.norm(dim=0)).max()) < 4 * LIMITS[dtype]


@FORMATS
@pytest.mark.parametrize("rank", [3, 128])
def test_one_read_of_a_weight_keeps_float32(device, dtype, rank):
    weight = torch.randn(700, 515, device=device).to(dtype)
    for matrix in (weight, weight.t()):
        thin, squares = torch.randn(matrix.shape[0], rank, device=device), torch.randn(matrix.shape[0], device=device)
        expected = weight_pass.weight_pass(*doubled((matrix, thin, squares)), impl="torch")
        for ours, theirs in zip(weight_pass.weight_pass(matrix, thin, squares), expected, strict=True):
            assert relative_error(ours.double(), theirs) < LIMITS[torch.float32]


def layer_on(device, name, tokens=70):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, tokens, 96, 80, 8, dtype=torch.float32)
    params = {key: value.detach().to(device).requires_grad_() for key, value in params.items()}
    frozen = type(frozen)(*(None if value is None else value.to(device) for value in vars(frozen).values()))
    narrow = [value.detach().to(device, torch.bfloat16) for value in (weight, bias, x, grad)]
    narrow[2].requires_grad_()

    def layer(x, *values):
        named = dict(zip(params, values, strict=True))
        return adapted_linear(x, *narrow[:2], named, kind, 0.7, frozen=frozen, impl="triton")

    return layer, narrow[2], params, narrow[3]


@pytest.mark.parametrize("name", ["dora-rows", "bora-xs"])
def test_compiled_code_computes_the_same(device, name):
    layer, x, params, grad = layer_on(device, name)

    def block(x, *values):
        return layer(1.5 * x, *values).sin()

    plain, compiled = (
        values_and_gradients(lambda form=form: form(x, *params.values()), x, params, grad)
        for form in (block, torch.compile(block, fullgraph=True))
    )
    for ours, theirs in zip(compiled, plain, strict=True):
        assert relative_error(ours.double(), theirs.double()) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("name", ["lora", "dora-rows", "bora"])
def test_a_captured_graph_repeats_the_step(device, name):
    layer, x, params, grad = layer_on(device, name)

    def step():
        return values_and_gradients(lambda: layer(x, *params.values()), x, params, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [value.detach().clone() for value in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_the_measured_choice_is_kept_on_disk_and_not_made_where_runs_must_repeat(device, tmp_path):
    layer, x, params, grad = layer_on(device, "dora-rows")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        layer(x, *params.values())
    finally:
        torch.use_deterministic_algorithms(False)
    assert not (tmp_path / "tuning").exists()
    values_and_gradients(lambda: layer(x, *params.values()), x, params, grad)
    (file,) = (tmp_path / "tuning").glob("*.json")
    choices = json.loads(file.read_text())
    # Forward and backward.
    assert len(choices) == 2
    assert all(config in scaled_matmul.candidates(70, torch.bfloat16) for config in choices.values())
