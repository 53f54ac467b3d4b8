"""The Triton kernels in Triton's interpreter: every element, every gradient, against float64; and as operators.

bfloat16 is left to the GPU tests: the interpreter cuts its last bits off instead of rounding.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from layer_cases import (
    make_layer,
    materialised,
    relative_error,
    values_and_gradients,
    zero_a_row_and_a_column,
)
from sa3dist_kernels import (
    ADAPTER_TYPES,
    FrozenConstants,
    adapted_linear,
    dispatch,
    effective_weight_reference,
    frozen_constants,
)
from timing import peak_bytes
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from sa3dist_kernels import (  # noqa: E402
    fused_linear,
    gain_gradient,
    scaled_matmul,
    thin_norms,
    triton_support,
    weight_pass,
)

pytestmark = pytest.mark.skipif(not triton_support.interpreting(), reason="Triton was imported without its interpreter")

NINE = tuple(ADAPTER_TYPES)
# Roundings of one format that a result may be away from float64, relative L2.
ROUNDINGS = {torch.float32: 8.0, torch.float16: 2.0}
FORMS = {config["form"]: config for config in scaled_matmul.candidates(1, torch.float32)}


@pytest.fixture
def nan_memory(monkeypatch):
    """What an op allocates holds NaN until it is written."""
    new_empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def assert_close(got, expected, dtype, what=""):
    error = relative_error(got.double(), expected.double())
    assert error < ROUNDINGS[dtype] * torch.finfo(dtype).eps, f"{what}: {error:.1e}"


def product_arguments(tokens, inner, outer, rank, tail, dtype, everything=True):
    """Arguments of ``scaled_matmul``, its weight and lift with the strides of a transposed matrix."""

    def normal(*shape):
        return torch.randn(shape)

    named = {
        "left_gain_K": normal(inner),
        "out_gain_M": normal(outer),
        "bias_M": normal(outer).to(dtype),
        "other_NM": normal(tokens, outer).to(dtype),
        "tail_TK": normal(tail, inner).to(dtype),
    }
    matrices = normal(tokens, inner), normal(outer, inner).t(), normal(tokens, rank)
    return (*(matrix.to(dtype) for matrix in matrices), normal(outer, rank).t(), 0.7), named if everything else {}


def doubled(values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("sizes", [(37, 20, 33, 5, 7), (1, 17, 1, 1, 1), (16, 33, 18, 20, 19)])
def test_scaled_product_with_everything_is_the_reference_in_float64(form, dtype, sizes):
    arguments, named = product_arguments(*sizes, dtype)
    got = scaled_matmul.scaled_matmul(*arguments, config=FORMS[form], **named)
    named = dict(zip(named, doubled(named.values()), strict=True))
    expected = scaled_matmul.scaled_matmul(*doubled(arguments), impl="torch", **named)
    for what, ours, theirs in zip(("out", "sums", "tail"), got, expected, strict=True):
        assert_close(ours, theirs, dtype, what)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("rank", [1, 16, 17, 64, 65, 256])
def test_scaled_product_takes_any_rank_and_may_come_alone(rank):
    arguments, _ = product_arguments(9, 8, 19, rank, 1, torch.float32, everything=False)
    out, *others = scaled_matmul.scaled_matmul(*arguments)
    assert_close(out, scaled_matmul.scaled_matmul(*doubled(arguments), impl="torch")[0], torch.float32)
    assert others == [None, None]


@pytest.mark.parametrize("form", FORMS)
def test_offsets_beyond_32_bits_reach_the_right_numbers(form, tmp_path):
    # Rows 2^30 elements apart in a file with holes: the fifth starts where 32 bits have long wrapped around.
    apart, rows, columns = 1 << 30, 5, 3
    path = tmp_path / "sparse"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(2 * (apart * (rows - 1) + columns))
    memory = torch.from_file(str(path), shared=True, size=apart * (rows - 1) + columns, dtype=torch.float16)
    far = memory.as_strided((rows, columns), (apart, 1))
    far.copy_(torch.randn(rows, columns))
    left, thin = torch.randn(4, rows).half(), torch.randn(4, rows).half()
    # The library's own products are not under test: it gets a weight near by.
    weight = far if form == "fused" else far.contiguous()
    out, _, _ = scaled_matmul.scaled_matmul(left, weight, thin, far, 0.5, config=FORMS[form])
    assert_close(out, (left.double() + 0.5 * thin.double()) @ far.double(), torch.float16)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=["fp32", "fp16"])
def test_gain_gradient_is_exact_where_the_output_has_lost_the_product(dtype, with_bias):
    (left, weight, thin, lift, alpha), named = product_arguments(21, 18, 35, 3, 1, dtype)
    gain, bias = named["out_gain_M"], named["bias_M"] if with_bias else None
    gain[3], gain[20] = 0, 1e-5
    if with_bias:
        # In the output of these columns fewer bits of the product are left than its format has, or none.
        bias[5], bias[33] = 300, 5000
    product = scaled_matmul.scaled_matmul(*doubled((left, weight, thin, lift, alpha)), impl="torch")[0]
    y = (gain.double() * product + (0 if bias is None else bias.double())).to(dtype)
    grad = torch.randn(21, 35).to(dtype)
    got = gain_gradient.gain_gradient(grad, y, gain, bias, left, weight, thin, lift, alpha)
    terms = grad.double() * product
    # Column by column, in roundings of the terms of its sum; a bias may cost a factor of four.
    errors = (got.double() - terms.sum(0)).abs() / terms.norm(dim=0)
    assert float(errors.max()) < 4 * ROUNDINGS[dtype] * torch.finfo(dtype).eps


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("inner", "outer", "rank"), [(150, 21, 3), (1, 1, 1), (70, 33, 20)])
def test_one_read_of_a_weight_gives_thin_product_and_squares(inner, outer, rank):
    weight, thin, squares = torch.randn(outer, inner).half().t(), torch.randn(rank, inner).t(), torch.randn(inner)
    found = weight_pass.weight_pass(weight, thin, squares)
    expected = weight_pass.weight_pass(*doubled((weight, thin, squares)), impl="torch")
    for what, ours, theirs in zip(("cross", "totals"), found, expected, strict=True):
        assert_close(ours, theirs, torch.float32, what)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("side", "rank"), [(37, 3), (1, 1), (18, 70)])
def test_norms_and_their_gradient_from_thin_products(side, rank):
    cross, factor, other = torch.randn(rank, side).t(), torch.randn(rank, side).t(), torch.randn(rank, 5)
    squares, magnitude, slope = torch.rand(side) * 400 * rank, torch.randn(side), torch.randn(side)
    # Rounding can leave a vanishing row's sum below zero: length zero, not NaN.
    squares[0] = -1e6
    thin, numbers = (cross, factor, other @ other.t()), (0.5, 1e-12)
    found = thin_norms.thin_norms(*thin, squares, magnitude, *numbers)
    expected = thin_norms.thin_norms(*doubled((*thin, squares, magnitude)), *numbers, impl="torch")
    for what, ours, theirs in zip(("gain", "norms"), found, expected, strict=True):
        assert_close(ours, theirs, torch.float32, what)
    assert found[1][0] == 0
    grad = thin_norms.thin_norms_backward(*thin, slope, 0.5)
    assert_close(grad, thin_norms.thin_norms_backward(*doubled((*thin, slope)), 0.5, impl="torch"), torch.float32)


def in_format(layer, dtype):
    """The layer in ``dtype``, trained tensors in float32; and all of it in float64."""
    weight, bias, params, frozen, x, grad = layer

    def moved(to, trained):
        values = [None if value is None else value.detach().to(to) for value in (weight, bias, x, grad)]
        constants = FrozenConstants(*(None if v is None else v.to(trained) for v in vars(frozen).values()))
        return *values, {k: v.detach().to(trained).requires_grad_() for k, v in params.items()}, constants

    rough = moved(dtype, torch.float32)
    return rough, tuple(doubled(rough[:4])) + moved(torch.float64, torch.float64)[4:]


def evaluate(form, kind, weight, bias, x, grad, params, frozen):
    x = x.clone().requires_grad_()
    y = values_and_gradients(lambda: form(x, weight, bias, params, kind, 0.7, frozen), x, params, grad)
    return dict(zip(["y", "x", *params], y, strict=True))


def fused(x, weight, bias, params, kind, scale, frozen):
    return adapted_linear(x, weight, bias, params, kind, scale, frozen=frozen, impl="triton")


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", NINE)
def test_every_type_and_gradient_is_the_materialised_form_in_float64(name, dtype):
    kind = ADAPTER_TYPES[name]
    layer = make_layer(kind, 19, 21, 18, 3, bias=dtype == torch.float32, dtype=torch.float32)
    rough, exact = in_format(layer, dtype)
    expected = evaluate(materialised, kind, *exact)
    for key, value in evaluate(fused, kind, *rough).items():
        assert value.dtype == (dtype if key in ("y", "x") else torch.float32)
        assert_close(value, expected[key], dtype, key)


@pytest.mark.parametrize("name", ["dora-rows", "bora", "dora-cols-xs"])
@pytest.mark.parametrize("factor", [2.0**-30, 2.0**30])
def test_gradients_grow_with_what_they_are_asked_for_to_the_last_bit(name, factor):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, 6, 9, 7, 3, dtype=torch.float32)
    whole = evaluate(fused, kind, weight, bias, x, grad, params, frozen)
    scaled = evaluate(fused, kind, weight, bias, x, factor * grad, params, frozen)
    # A power of two changes no digit; a clipping, or an epsilon beside a gradient, would.
    assert all(torch.equal(value if key == "y" else factor * value, scaled[key]) for key, value in whole.items())


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", ["dora-rows", "dora-cols", "bora", "bora-xs"])
def test_zero_rows_and_columns_give_zero_gradients_and_no_nan(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, 6, 9, 7, 3, dtype=torch.float32)
    with torch.no_grad():
        weight[4], weight[:, 2] = 0, 0
        if kind.xs:
            frozen.left_OR[4], frozen.right_IR[2] = 0, 0
    zero_a_row_and_a_column(kind, params)
    bases = (frozen.left_OR, frozen.right_IR) if kind.xs else ()
    found = evaluate(fused, kind, weight, bias, x, grad, params, frozen_constants(weight, *bases))
    assert all(value.isfinite().all() for value in found.values())
    if kind.rows:
        assert found[kind.row_magnitude][4] == 0
        assert torch.equal(found["y"][:, 4], bias[4].expand(6))
    if kind.cols:
        assert found[kind.col_magnitude][2] == 0
        assert not found["x"][:, 2].any()


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", ["lora", "dora-rows", "bora"])
def test_any_subset_of_gradients_and_any_number_of_tokens(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, 5, 10, 6, 2, dtype=torch.float32)
    whole = evaluate(fused, kind, weight, bias, x, grad, params, frozen)
    leaves = {"x": x, **params}
    for wanted in (["x"], list(params), list(params)[-1:]):
        for key, leaf in leaves.items():
            leaf.requires_grad_(key in wanted)
        y = fused(x, weight, bias, params, kind, 0.7, frozen)
        for key, gradient in zip(wanted, torch.autograd.grad(y, [leaves[key] for key in wanted], grad), strict=True):
            torch.testing.assert_close(gradient, whole[key])
    for leaf in leaves.values():
        leaf.requires_grad_()
    none = evaluate(fused, kind, weight, bias, x[:0].detach(), grad[:0], params, frozen)
    assert none["y"].shape == (0, 10)
    assert not any(none[key].any() for key in params)


@pytest.mark.parametrize("name", ["dora-rows", "bora-xs"])
def test_recomputation_under_checkpointing_changes_no_bit(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, 5, 10, 6, 2, dtype=torch.float32)

    def checkpointed(x, *rest):
        return checkpoint(fused, x, *rest, use_reentrant=False)

    plain, again = (
        evaluate(form, kind, weight, bias, x.detach(), grad, params, frozen) for form in (fused, checkpointed)
    )
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_nothing_of_the_outputs_size_is_kept_but_the_output():
    kind = ADAPTER_TYPES["dora-rows"]
    weight, bias, params, frozen, x, _ = make_layer(kind, 40, 60, 50, 2, dtype=torch.float32)
    kept = {}

    def note(value):
        kept[value.untyped_storage().data_ptr()] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        y = fused(x, weight, bias, params, kind, 0.7, frozen)
    given = [x, y, weight, bias, *params.values(), *(v for v in vars(frozen).values() if v is not None)]
    extra = sum(size for place, size in kept.items() if place not in {v.untyped_storage().data_ptr() for v in given})
    # R z, gain, norms and W0 R^T; the outputs are 2400 numbers.
    assert 0 < extra <= 40 * 2 + 2 * 60 + 60 * 2


@pytest.mark.parametrize("name", ["dora-rows", "bora"])
def test_forward_and_backward_take_hardly_more_memory_than_a_frozen_layers(name):
    kind, (tokens, fan_out, fan_in, rank) = ADAPTER_TYPES[name], (64, 160, 96, 1)
    weight, bias, params, frozen, x, grad = make_layer(kind, tokens, fan_out, fan_in, rank, dtype=torch.float32)

    def peak(form):
        return (
            peak_bytes(lambda: torch.autograd.grad(form(), [x, *params.values()], grad, allow_unused=True), x.device)
            / 4
        )

    extra = peak(lambda: fused(x, weight, bias, params, kind, 0.7, frozen)) - peak(lambda: F.linear(x, weight, bias))
    # Factors, gains and norms; what is found per token; and the gain's sums over spans of 16 tokens, which on a GPU are
    # longer. The outputs are 10240 numbers, the weight 15360.
    bound = 6 * rank * (fan_out + fan_in) + 6 * (fan_out + fan_in) + 6 * tokens * rank + 3 * 4 * fan_out
    assert 0 < extra < bound < tokens * fan_out / 1.7
    materialised = peak(lambda: F.linear(x, effective_weight_reference(weight, params, kind, 0.7, frozen), bias))
    assert materialised > 4 * weight.numel()


def test_the_weight_is_kept_as_its_owner_has_it():
    # An owner that swaps the values in and out of its parameter (ZeRO-3) must not find a view of them held.
    kind = ADAPTER_TYPES["bora"]
    weight, bias, params, frozen, x, _ = make_layer(kind, 4, 6, 5, 2, dtype=torch.float32)
    owned = torch.nn.Parameter(weight[:, :, None], requires_grad=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value), lambda value: value):
        fused(x, owned, bias, params, kind, 0.7, frozen)
    assert any(value is owned for value in kept)
    assert not any(value is not owned and value.data_ptr() == owned.data_ptr() for value in kept)


def operator_arguments(name):
    """Arguments of the three operators, as ``fused_linear`` and its backward pass call them."""
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, 5, 10, 6, 2, dtype=torch.float32)
    slots = ("M_xs" if kind.xs else "lora_A", "lora_B", kind.row_magnitude, kind.col_magnitude)
    trained = [params.get(slot) for slot in slots]
    constants = [getattr(frozen, field) for field in fused_linear.Constants._fields]
    state = fused_linear.norm_state_op(x.detach(), weight, *(detached(v) for v in trained), *constants, 0.7)
    forward = (x, weight, bias, *trained, *constants, *state, 0.7)
    y, down = fused_linear.adapted_linear_op(*forward)
    backward = (grad, y, down, x, weight, bias, *trained, *constants, *state, 0.7, True, True)
    return {
        fused_linear.norm_state_op: (x, weight, *trained, *constants, 0.7),
        fused_linear.adapted_linear_op: forward,
        fused_linear.adapted_linear_backward_op: tuple(map(detached, backward)),
    }


def detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", ["dora-rows", "bora-xs"])
def test_operators_keep_the_promises_that_the_compiler_relies_on(name):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in operator_arguments(name).items():
        differentiable = operator is fused_linear.adapted_linear_op
        given = arguments if differentiable else tuple(map(detached, arguments))
        torch.library.opcheck(operator, given, test_utils=checks if differentiable else checks[:3])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("impl", "name"), [("triton", "dora-rows"), ("triton", "bora"), ("auto", "dora-rows")])
def test_the_compiler_sees_through_the_layer_without_a_break(impl, name, backend):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, 5, 10, 6, 2, dtype=torch.float32)

    def block(x, *values):
        named = dict(zip(params, values, strict=True))
        return adapted_linear(1.5 * x, weight, bias, named, kind, 0.7, frozen=frozen, impl=impl).sin()

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    plain, traced = (
        values_and_gradients(lambda form=form: form(x, *params.values()), x, params, grad) for form in (block, compiled)
    )
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(plain, traced, strict=True))


def test_auto_takes_torch_on_a_cpu_and_says_so_once(caplog):
    dispatch._auto.cache_clear()
    with caplog.at_level(logging.INFO, "sa3dist_kernels.dispatch"):
        for _ in range(3):
            assert not dispatch.runs_fused("auto", torch.device("cpu"), torch.float32, torch.float32)
    assert [record.message for record in caplog.records] == [
        "adapted layers on cpu in torch.float32: torch (the kernels need a CUDA device)"
    ]


def test_auto_trusts_kernels_that_agree_with_torch_and_warns_of_those_that_do_not(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_obstacle", lambda device, dtype: None)
    dispatch._auto.cache_clear()
    assert dispatch._auto("cpu", None, torch.float32)
    exact = fused_linear.scaled_matmul

    def wrong(*args, **kwargs):
        out, *rest = exact(*args, **kwargs)
        return 1.1 * out, *rest

    for broken, message in ((wrong, r"dora-rows: y is 1.0e-01 from torch's"), (None, "TypeError: 'NoneType' object")):
        monkeypatch.setattr(fused_linear, "scaled_matmul", broken)
        dispatch._auto.cache_clear()
        assert not dispatch._auto("cpu", None, torch.float32)
        assert message in caplog.records[-1].message
        assert caplog.records[-1].levelno == logging.WARNING
    dispatch._auto.cache_clear()


def test_triton_by_name_says_why_it_cannot_run(monkeypatch):
    kind = ADAPTER_TYPES["dora-rows"]
    weight, bias, params, frozen, x, _ = make_layer(kind, 3, 5, 4, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="not torch.float64; use impl='torch'"):
        fused(x.double(), weight, bias, params, kind, 1.0, frozen)
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device, the input is on cpu; .*TRITON_INTERPRET=1"):
        fused(x, weight, bias, params, kind, 1.0, frozen)
