"""A layer whose W' is formed for each use, in Triton's interpreter: every gradient against float64; and as operators.

bfloat16 is left to the GPU tests: the interpreter cuts its last bits off instead of rounding.
"""

import pytest
import torch
from sa3dist_kernels import (
    ADAPTER_TYPES,
    FormedSpec,
    FormedWeights,
    FrozenConstants,
    adapted_linear,
    dispatch,
    frozen_constants,
)
from torch.utils.checkpoint import checkpoint

from tests.helpers.layer_cases import (
    make_layer,
    materialised,
    relative_error,
    values_and_gradients,
    zero_a_row_and_a_column,
)

pytest.importorskip("triton")
from sa3dist_kernels import formed_per_use, triton_support  # noqa: E402

pytestmark = pytest.mark.skipif(not triton_support.interpreting(), reason="Triton was imported without its interpreter")

NINE = tuple(ADAPTER_TYPES)
# Roundings of one format that a result may be away from float64, relative L2.
ROUNDINGS = {torch.float32: 8.0, torch.float16: 2.0}


@pytest.fixture
def nan_memory(monkeypatch):
    """What an op allocates holds NaN until it is written."""

    def filling(make):
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return filled

    monkeypatch.setattr(torch.Tensor, "new_empty", filling(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", filling(torch.empty))


def assert_close(got, expected, dtype, what=""):
    error = relative_error(got.double(), expected.double())
    assert error < ROUNDINGS[dtype] * torch.finfo(dtype).eps, f"{what}: {error:.1e}"


def doubled(values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


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


def per_use(x, weight, bias, params, kind, scale, frozen):
    return adapted_linear(x, weight, bias, params, kind, scale, frozen=frozen, impl="triton")


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", NINE)
def test_every_type_and_gradient_is_the_materialised_form_in_float64(name, dtype):
    kind = ADAPTER_TYPES[name]
    layer = make_layer(kind, 19, 21, 18, 3, bias=dtype == torch.float32, dtype=torch.float32)
    rough, exact = in_format(layer, dtype)
    expected = evaluate(materialised, kind, *exact)
    for key, value in evaluate(per_use, kind, *rough).items():
        assert value.dtype == (dtype if key in ("y", "x") else torch.float32)
        assert_close(value, expected[key], dtype, key)


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
    found = evaluate(per_use, kind, weight, bias, x, grad, params, frozen_constants(weight, *bases))
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
    whole = evaluate(per_use, kind, weight, bias, x, grad, params, frozen)
    leaves = {"x": x, **params}
    for wanted in (["x"], list(params), list(params)[-1:]):
        for key, leaf in leaves.items():
            leaf.requires_grad_(key in wanted)
        y = per_use(x, weight, bias, params, kind, 0.7, frozen)
        for key, gradient in zip(wanted, torch.autograd.grad(y, [leaves[key] for key in wanted], grad), strict=True):
            torch.testing.assert_close(gradient, whole[key])
    for leaf in leaves.values():
        leaf.requires_grad_()
    none = evaluate(per_use, kind, weight, bias, x[:0].detach(), grad[:0], params, frozen)
    assert none["y"].shape == (0, 10)
    assert not any(none[key].any() for key in params)


@pytest.mark.parametrize("name", ["dora-rows", "bora"])
def test_autocast_and_a_convolutions_weight_give_the_bits_of_the_narrow_input_and_the_matrix(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, 5, 10, 6, 2, dtype=torch.float32)
    narrow, grad = x.detach().half(), grad.half()
    expected = evaluate(per_use, kind, weight, bias, narrow, grad, params, frozen)
    with torch.autocast("cpu", torch.float16):
        found = evaluate(per_use, kind, weight[:, :, None], bias, x.detach(), grad, params, frozen)
    assert found["y"].dtype == torch.float16
    assert all(found[key].dtype == torch.float32 for key in ("x", *params))
    assert all(torch.equal(found[key].to(value.dtype), value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["dora-rows", "bora-xs"])
def test_recomputation_under_checkpointing_changes_no_bit(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, 5, 10, 6, 2, dtype=torch.float32)

    def checkpointed(x, *rest):
        return checkpoint(per_use, x, *rest, use_reentrant=False)

    plain, again = (
        evaluate(form, kind, weight, bias, x.detach(), grad, params, frozen) for form in (per_use, checkpointed)
    )
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize("name", NINE)
def test_nothing_is_kept_per_token_but_the_input_and_for_rows_the_output_without_its_bias(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, _ = make_layer(kind, 40, 60, 50, 2, dtype=torch.float32)
    kept = {}

    def note(value):
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        y = per_use(x, weight, bias, params, kind, 0.7, frozen)
    given = [x, weight, *params.values(), *(v for v in vars(frozen).values() if v is not None)]
    extra = [value for place, value in kept.items() if place not in {v.untyped_storage().data_ptr() for v in given}]
    assert len(extra) == kind.rows
    for value in extra:
        torch.testing.assert_close(value + bias, y)


def test_the_weight_is_kept_as_its_owner_has_it():
    # An owner that swaps the values in and out of its parameter (ZeRO-3) must not find a view of them held.
    kind = ADAPTER_TYPES["bora"]
    weight, bias, params, frozen, x, _ = make_layer(kind, 4, 6, 5, 2, dtype=torch.float32)
    owned = torch.nn.Parameter(weight[:, :, None], requires_grad=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value), lambda value: value):
        per_use(x, owned, bias, params, kind, 0.7, frozen)
    assert any(value is owned for value in kept)
    assert not any(value is not owned and value.data_ptr() == owned.data_ptr() for value in kept)


def operator_arguments(name):
    """Arguments of both operators, as the layer calls them."""
    kind = ADAPTER_TYPES[name]
    weight, _, params, frozen, x, grad = make_layer(kind, 5, 10, 6, 2, dtype=torch.float32)
    rest = (list(params.values()), name, weight, list(vars(frozen).values()) if kind.xs else [], 0.7)
    z = formed_per_use.formed_product_op(x.detach(), *map(detached, rest))
    return {
        formed_per_use.formed_product_op: (x, *rest),
        formed_per_use.formed_gradients_op: (grad, x, z, *rest, True, True),
    }


def detached(value):
    if isinstance(value, list):
        return [detached(one) for one in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", ["dora-rows", "bora-xs"])
def test_operators_keep_the_promises_that_the_compiler_relies_on(name):
    for operator, arguments in operator_arguments(name).items():
        torch.library.opcheck(operator, tuple(map(detached, arguments)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("impl", "name"), [("triton", "dora-rows"), ("triton", "bora"), ("auto", "dora-rows")])
def test_the_compiler_sees_through_the_layer_without_a_break(impl, name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, grad = make_layer(kind, 5, 10, 6, 2, dtype=torch.float32)

    def block(x, *values):
        named = dict(zip(params, values, strict=True))
        return adapted_linear(1.5 * x, weight, bias, named, kind, 0.7, frozen=frozen, impl=impl).sin()

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    plain, traced = (
        values_and_gradients(lambda form=form: form(x, *params.values()), x, params, grad) for form in (block, compiled)
    )
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(plain, traced, strict=True))


@pytest.mark.parametrize(
    ("capability", "dtype", "why"),
    [
        ((9, 0), torch.bfloat16, None),
        ((8, 0), torch.float32, None),
        ((8, 6), torch.bfloat16, None),
        ((12, 0), torch.bfloat16, None),
        ((8, 0), torch.float16, "the kernels do not train in torch.float16"),
        ((7, 5), torch.float32, "Tesla T4 is older than compute capability 8.0"),
    ],
)
def test_kernels_are_for_gpus_since_ampere_and_formats_with_a_wide_range(monkeypatch, capability, dtype, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert dispatch.obstacle_to(torch.device("cuda", 0), dtype) == why


@pytest.mark.parametrize("kind", ADAPTER_TYPES)
def test_kernels_serve_once_they_agree_with_torch_and_the_layer_is_as_before(monkeypatch, kind):
    weight, _, params, frozen, *_ = make_layer(ADAPTER_TYPES[kind], 3, 37, 26, 1, dtype=torch.float32)
    params = {name: value.detach() for name, value in params.items()}
    grads = {name: torch.zeros_like(value) for name, value in params.items()}
    formed = FormedWeights(
        [FormedSpec(weight, params, grads, ADAPTER_TYPES[kind], 0.5, frozen)], torch.float32, "triton"
    )
    before = {name: value.clone() for name, value in params.items()}
    assert dispatch.trial(formed) is None
    assert all(torch.equal(params[name], value) for name, value in before.items())
    assert not any(bool(value.any()) for value in grads.values())
    # What is told of kernels that do not agree is the same for every type.
    if kind not in ("bora", "lora-xs"):
        return
    exact = dispatch.raw_sums

    def broken(*given, impl="triton"):
        return [sums * (1.1 if impl == "triton" else 1) for sums in exact(*given, impl=impl)]

    for wrong, message in (
        (broken, f"{kind}: raw sums is 1.0e-01 from torch's"),
        (None, "TypeError: 'NoneType' object"),
    ):
        monkeypatch.setattr(dispatch, "raw_sums", wrong)
        assert message in dispatch.trial(formed)
    assert all(torch.equal(params[name], value) for name, value in before.items())
    assert not any(bool(value.any()) for value in grads.values())


def test_triton_by_name_says_why_it_cannot_run(monkeypatch):
    kind = ADAPTER_TYPES["dora-rows"]
    weight, bias, params, frozen, x, _ = make_layer(kind, 3, 5, 4, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="not torch.float64; use impl='torch'"):
        per_use(x.double(), weight, bias, params, kind, 1.0, frozen)
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device, the input is on cpu; .*TRITON_INTERPRET=1"):
        per_use(x, weight, bias, params, kind, 1.0, frozen)


def test_a_layer_of_the_width_most_weights_have_is_tried_too(monkeypatch):
    kind, specs = ADAPTER_TYPES["dora-rows"], []
    for size in ((57, 32), (18, 19), (23, 32)):
        params = {name: torch.ones(shape) for name, shape in kind.parameter_shapes(*size, 2).items()}
        grads = {name: torch.zeros_like(value) for name, value in params.items()}
        specs.append(FormedSpec(torch.ones(size), params, grads, kind, 1.0))
    formed, tried = FormedWeights(specs, torch.float32, "torch"), []
    monkeypatch.setattr(dispatch, "_try_layer", lambda formed, spec, layer: tried.append(spec.weight_OI.shape))
    assert dispatch.trial(formed) is None
    assert tried == [(18, 19), (23, 32)]
    monkeypatch.setattr(dispatch, "_try_layer", lambda formed, spec, layer: spec.fan_in == 32 and "wrong")
    assert dispatch.trial(formed) == "wrong"
