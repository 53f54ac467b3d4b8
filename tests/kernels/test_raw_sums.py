"""The raw sums of a formed layer in Triton's interpreter, against float64; and the layer under the compiler.

bfloat16 is left to the GPU tests: the interpreter cuts its last bits off instead of rounding.
"""

import types

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES, formed_linear
from torch.utils.checkpoint import checkpoint

from tests.helpers.layer_cases import relative_error

pytest.importorskip("triton")
from sa3dist_kernels import raw_sums, sums_plan, triton_support  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not triton_support.interpreting(), reason="Triton was imported without its interpreter"
)
NINE = tuple(ADAPTER_TYPES)
# Roundings of one format that a sum may be away from float64, relative L2: T and U are rounded before they are used.
ROUNDINGS = {torch.float32: 8.0, torch.float16: 2.0}
FORMATS = pytest.mark.parametrize("dtype", ROUNDINGS, ids=["fp32", "fp16"])


@pytest.fixture
def nan_memory(monkeypatch):
    """What an op allocates holds NaN until it is written."""
    new_empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def operands(kind, tokens, fan_in, fan_out, rank, dtype, columns=slice(None)):
    """x, dx, dy, z, L' and R' of a layer; ``columns`` takes the first four out of wider tensors."""
    draw = torch.Generator().manual_seed(tokens + fan_in)

    def normal(rows, width):
        return torch.randn(rows, width, generator=draw).to(dtype)

    x, dx, dy, z = (normal(tokens, 3 * width)[:, columns][:, :width] for width in (fan_in, fan_in, fan_out, fan_out))
    thin = normal(fan_out, rank) / rank**0.5, normal(rank, fan_in) / fan_in**0.5
    return x, dx if kind.cols else None, dy, z if kind.rows else None, *thin


def sums_of(kind, *given):
    """Of one layer."""
    return raw_sums.raw_sums([raw_sums.LayerPass(*given)], kind)[0]


def check(kind, given, dtype):
    return check_sums(kind, given, sums_of(kind, *given), dtype)


def check_sums(kind, given, found, dtype):
    """Each sum by itself, against float64."""
    assert found.dtype == torch.float32
    exact = raw_sums.raw_sums_reference(*(None if v is None else v.double() for v in given), kind)
    shapes = kind.parameter_shapes(given[4].shape[0], given[5].shape[1], given[4].shape[1])
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    for name, ours, theirs in zip(shapes, found.split(sizes), exact.split(sizes), strict=True):
        assert relative_error(ours.double(), theirs) < ROUNDINGS[dtype] * torch.finfo(dtype).eps, name
    return found


@needs_interpreter
@FORMATS
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", NINE)
def test_sums_of_every_type_are_those_of_float64(name, dtype):
    kind = ADAPTER_TYPES[name]
    check(kind, operands(kind, 37, 21, 35, 3, dtype), dtype)


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("rank", [1, 16, 40, 70])
@pytest.mark.parametrize("name", ["bora", "bora-xs"])
def test_any_rank_is_taken_in_blocks(name, rank):
    kind = ADAPTER_TYPES[name]
    check(kind, operands(kind, 19, 18, 17, rank, torch.float32), torch.float32)


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("tokens", "fan_in", "fan_out"), [(1, 33, 17), (1, 1, 1), (16, 16, 48), (0, 5, 6)])
@pytest.mark.parametrize("name", ["lora", "bora", "dora-rows-xs"])
def test_any_number_of_tokens_and_any_width(name, tokens, fan_in, fan_out):
    kind = ADAPTER_TYPES[name]
    check(kind, operands(kind, tokens, fan_in, fan_out, 3, torch.float32), torch.float32)


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("programs", "sum_programs"), [(1, 1), (40, 40)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("lora", torch.float32), ("bora", torch.float32), ("bora-xs", torch.float32), ("bora", torch.float16)],
)
def test_shares_and_spans_add_up_and_in_one_order(name, programs, sum_programs, dtype, monkeypatch):
    # Not those kept for other tests' constants, nor the other way around.
    plan_of = sums_plan.plan_of.__wrapped__
    monkeypatch.setattr(sums_plan, "MIN_TOKEN_SPAN", 16)
    monkeypatch.setattr(sums_plan, "PROGRAMS", programs)
    monkeypatch.setattr(sums_plan, "SUM_PROGRAMS", sum_programs)
    kind, plans = ADAPTER_TYPES[name], []
    monkeypatch.setattr(raw_sums, "plan_of", lambda *given: plans.append(plan_of(*given)) or plans[-1])
    given = operands(kind, 130 if kind.xs else 50, 33, 35, 3, dtype)
    found = check(kind, given, dtype)
    assert torch.equal(sums_of(kind, *given), found)
    for plan in plans:
        shares = plan.sizes[:, :, sums_plan.Side._fields.index("channel_splits")].flatten().tolist()
        assert all((count > 1) == (programs > 1) for count in [*shares, plan.token_splits])
    assert len(plans) == 2


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bora", torch.float32),
        ("dora-cols", torch.float32),
        ("lora-xs", torch.float32),
        ("bora-xs", torch.float16),
    ],
)
def test_layers_of_any_shape_and_number_of_tokens_share_their_launches(name, dtype, monkeypatch):
    # Some layers' sums are shared out, some tokens are fewer than the splits, one layer's rows begin anywhere.
    monkeypatch.setattr(raw_sums, "plan_of", sums_plan.plan_of.__wrapped__)
    monkeypatch.setattr(sums_plan, "MIN_TOKEN_SPAN", 16)
    kind = ADAPTER_TYPES[name]
    given = [
        raw_sums.LayerPass(*operands(kind, tokens, fan_in, fan_out, 3, dtype))
        for tokens, fan_in, fan_out in ((34, 40, 32), (34, 16, 48), (7, 24, 24), (1, 33, 16), (0, 8, 8))
    ]
    found = raw_sums.raw_sums(given, kind)
    assert len(found) == len(given)
    for layer, sums in zip(given, found, strict=True):
        check_sums(kind, layer, sums, dtype)
    assert all(map(torch.equal, raw_sums.raw_sums(given, kind), found))


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("columns", [slice(1, None), slice(None, None, 2)], ids=["rows of a wider one", "every other"])
@pytest.mark.parametrize("name", ["bora", "bora-xs"])
def test_strided_operands_give_the_contiguous_ones_bits(name, columns):
    kind = ADAPTER_TYPES[name]
    given = operands(kind, 21, 18, 20, 3, torch.float32, columns)
    assert not any(value.is_contiguous() for value in given[:4] if value is not None)
    found = check(kind, given, torch.float32)
    whole = [None if value is None else value.contiguous() for value in given]
    assert torch.equal(sums_of(kind, *whole), found)


@pytest.mark.parametrize("shared", [227 << 10, 163 << 10, 99 << 10])
@pytest.mark.parametrize("rank", [16, 32, 64])
def test_the_tiles_in_flight_fit_the_shared_memory_of_the_device(rank, shared, monkeypatch):
    monkeypatch.setattr(sums_plan, "interpreting", lambda: False)
    shapes = (sums_plan.LayerShape(387, 1536, 12288, 1536, 1536, 12288, 12288),)
    given = shapes, rank, ADAPTER_TYPES["bora"], torch.bfloat16, "ieee", torch.device("cpu"), shared
    constants = sums_plan.plan_of.__wrapped__(*given).sums.constants
    # x and dx, and T in float32 in four parts.
    tiles = 2 * 2 * constants["BLOCK_M"] + 4 * 4 * constants["BLOCK_R"]
    in_flight = constants["BLOCK_N"] * tiles * (constants["STAGES"] - 1)
    assert in_flight <= shared - 1024


@needs_interpreter
def test_plans_are_made_for_the_shared_memory_of_the_operands_device(monkeypatch):
    asked = []

    def properties(device):
        asked.append(device)
        return types.SimpleNamespace(shared_memory_per_block_optin=99 << 10)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    # Not kept for other tests.
    assert triton_support.shared_bytes.__wrapped__(torch.device("cuda", 1)) == 99 << 10
    assert asked == [torch.device("cuda", 1)]
    plans, plan_of = [], sums_plan.plan_of.__wrapped__
    monkeypatch.setattr(raw_sums, "shared_bytes", lambda device: 99 << 10)
    monkeypatch.setattr(raw_sums, "plan_of", lambda *given: plans.append(plan_of(*given)) or plans[-1])
    kind = ADAPTER_TYPES["dora-rows"]
    check(kind, operands(kind, 19, 18, 17, 3, torch.float32), torch.float32)
    # A 4090's other programs are few anyway.
    assert [plan.sums.constants["maxnreg"] for plan in plans] == [triton_support.MAX_REGISTERS]


def test_launches_are_kept_only_for_operands_that_take_the_same_kernels():
    whole = raw_sums.LayerPass(*operands(ADAPTER_TYPES["dora-rows"], 16, 32, 48, 16, torch.float16))
    # Private: without a device nothing launched shows which way a call has taken.
    assert raw_sums._is_aligned([whole, whole])
    assert not raw_sums._is_aligned([whole, whole._replace(z=whole.z.float())])
    for name in ("x", "dy", "z", "left_OR", "right_RI"):
        value = getattr(whole, name)
        displaced = value.new_empty(value.numel() + 1)[1:].view(value.shape)
        assert not raw_sums._is_aligned([whole, whole._replace(**{name: displaced})]), name


@needs_interpreter
def test_a_nan_in_one_token_reaches_only_what_it_belongs_to():
    kind = ADAPTER_TYPES["bora"]
    x, dx, dy, z, left, right = operands(kind, 21, 18, 20, 3, torch.float32)
    z = z.clone()
    z[4, 7] = float("nan")
    found = sums_of(kind, x, dx, dy, z, left, right)
    assert found.isnan().nonzero().flatten().tolist() == [3 * 18 + 20 * 3 + 7]


def formed_layer(kind, fan_in=18, fan_out=20, rank=3, impl="torch"):
    """The layer as a function of its input, and the leaf that gets its sums, with a gradient to add to."""
    x, _, _, _, left, right = operands(kind, 1, fan_in, fan_out, rank, torch.float32)
    weight = torch.randn(fan_out, fan_in) / fan_in**0.5
    shapes = kind.parameter_shapes(fan_out, fan_in, rank)
    sums = torch.zeros(sum(torch.Size(shape).numel() for shape in shapes.values()), requires_grad=True)
    sums.grad = torch.zeros_like(sums)
    return (lambda x: formed_linear(x, sums, weight, left, right, kind, impl).sin()), sums, (weight, left, right)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("name", ["lora", "dora-rows", "bora-xs"])
def test_compiled_over_several_lengths_the_sums_of_micro_batches_add_up_in_place(name, impl):
    kind = ADAPTER_TYPES[name]
    layer, sums, (weight, left, right) = formed_layer(kind, impl=impl)
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled, place = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True), sums.grad.data_ptr()
    expected = torch.zeros_like(sums, dtype=torch.float64)
    for tokens in (7, 13, 30):
        x, dx = torch.randn(tokens, 18, requires_grad=True), torch.randn(tokens, 20)
        y = compiled(x)
        y.backward(dx)
        z = x.detach().double() @ weight.double().t()
        dy = dx.double() * z.cos()
        back = dy @ weight.double()
        double = (x.detach().double(), back, dy, z, left.double(), right.double())
        expected += raw_sums.raw_sums_reference(*double, kind)
        assert relative_error(x.grad.double(), back) < 1e-6
    assert relative_error(sums.grad.double(), expected) < 2e-6
    assert sums.grad.data_ptr() == place
    assert len(graphs) == 1


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("name", ["dora-rows", "bora"])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_adds_the_same_bits_once(name, impl, compiled):
    layer, sums, _ = formed_layer(ADAPTER_TYPES[name], impl=impl)
    torch._dynamo.reset()
    if compiled:
        layer = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    x, dy, found = torch.randn(3, 5, 18), torch.randn(3, 5, 20), []
    for recompute in (False, True):
        sums.grad.zero_()
        given = x.clone().requires_grad_()
        y = checkpoint(layer, given, use_reentrant=False) if recompute else layer(given)
        y.backward(dy)
        found.append((y.detach(), given.grad, sums.grad.clone()))
    assert all(map(torch.equal, *found))
    assert found[0][2].any()
