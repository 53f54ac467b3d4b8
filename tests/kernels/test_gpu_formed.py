"""Formed weights on a CUDA device: FORM, FINISH and raw sums in every format, and whole steps that use them."""

import dataclasses
import math

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES
from sa3dist_kernels.formed_weights import FormedWeights

import sa3dist
from sa3dist.adapters import adapter_parameters, attach_adapter
from sa3dist.model.compiled import compile_blocks
from sa3dist.model.packing import Packing
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.graph_recorder import Recorder
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.shape_ladder import ShapeLadder
from sa3dist.training.trainer import Trainer
from tests.helpers.golden import golden
from tests.helpers.host_recorder import HostRecorder
from tests.helpers.layer_cases import relative_error
from tests.helpers.recorded_step import StepSettings, recorded_batch, shifted

pytest.importorskip("triton")
from sa3dist_kernels import raw_sums, triton_support  # noqa: E402

from tests.helpers.formed_layers import check_formed, check_gradients, check_layers, make_cases  # noqa: E402

pytestmark = pytest.mark.gpu

NINE = tuple(ADAPTER_TYPES)
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
FORMATS = pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "bf16"])
ACCUMULATION = 2


@pytest.fixture(autouse=True)
def _exact_float32():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def implementation(device):
    """The kernels, but where Triton was imported for a GPU and there is none."""
    return "triton" if device.type == "cuda" or triton_support.interpreting() else "torch"


@pytest.mark.parametrize("product", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NINE)
def test_all_types_agree_with_float64_and_two_runs_to_the_last_bit(name, product, device):
    kind, impl = ADAPTER_TYPES[name], implementation(device)
    for rank in (16, 40) if device.type == "cuda" else (3,):
        sizes = [(41, 19), (128, 256), (300, 48)] if device.type == "cuda" else [(41, 19)]
        first = check_layers(kind, sizes, rank, product, impl, gradient=product, device=device)
        again = check_layers(kind, sizes, rank, product, impl, gradient=product, device=device)
        assert torch.equal(first, again)


def off_alignment(value):
    """The same values, one element behind where memory begins."""
    room = value.new_empty(value.numel() + 1)[1:].view(value.shape)
    return room.copy_(value)


@pytest.mark.parametrize("name", ["dora-rows", "bora", "bora-xs"])
def test_launches_are_right_again_on_other_values_and_where_a_weight_has_moved(name, device):
    sizes = [(128, 256), (300, 48)] if device.type == "cuda" else [(16, 32), (23, 19)]
    cases, _ = make_cases(ADAPTER_TYPES[name], sizes, 3, device=device)
    formed = FormedWeights([case.spec for case in cases], torch.float32, implementation(device))

    def check():
        formed.form()
        check_formed(cases, formed, torch.float32)
        for case in cases:
            case.load(case.sums())
        formed.finish()
        check_gradients(cases)

    check()
    for case in cases:
        for value in case.spec.params.values():
            value.mul_(1.25)
    check()
    # To another alignment: the kernels chosen before could not read it.
    weight = cases[-1].spec.weight_OI
    weight.set_(off_alignment(weight))
    check()


@FORMATS
@pytest.mark.parametrize("name", NINE)
def test_raw_sums_are_those_of_float64_and_two_runs_agree_to_the_last_bit(name, dtype, device):
    kind = ADAPTER_TYPES[name]
    # Odd sizes; a clip of 30 s and one of 380 s, shared out over programs and spans; a rank of two blocks.
    sizes = [(77, 330, 258, 7), (387, 512, 1536, 16), (4155, 1536, 512, 16), (1200, 256, 512, 72)]
    for tokens, fan_in, fan_out, rank in sizes if device.type == "cuda" else [(37, 21, 18, 3)]:
        x, dx, dy, z, left, right = (
            torch.randn(shape, device=device).to(dtype)
            for shape in [(tokens, fan_in)] * 2 + [(tokens, fan_out)] * 2 + [(fan_out, rank), (rank, fan_in)]
        )
        given = raw_sums.LayerPass(x, dx if kind.cols else None, dy, z if kind.rows else None, left, right)
        impl = implementation(device)
        # Of several layers too, one of which lies so that no long vectors can be loaded.
        moved = raw_sums.LayerPass(*(None if value is None else off_alignment(value) for value in given))
        (found,), (again,) = (raw_sums.raw_sums([given], kind, impl=impl) for _ in range(2))
        for joined in raw_sums.raw_sums([given, moved, given], kind, impl=impl):
            assert relative_error(joined, found) < LIMITS[dtype]
        exact = raw_sums.raw_sums_reference(*(None if v is None else v.double() for v in given), kind)
        lengths = [math.prod(shape) for shape in kind.parameter_shapes(fan_out, fan_in, rank).values()]
        for ours, theirs in zip(found.split(lengths), exact.split(lengths), strict=True):
            assert relative_error(ours.double(), theirs) < LIMITS[dtype]
        assert torch.equal(found, again)


def make_trainer(device, kind, precision, products="formed"):
    base = sa3dist.load_base(
        golden("tiny-sa3"), device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    attach_adapter(base, kind, rank=4)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(base).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw).to(device)
    settings = StepSettings(precision, adapter_products=products)
    plan = RunPlan(9, ACCUMULATION, 2, 4, 42, {}, ["a", "b"])
    return Trainer(base, adapter_parameters(base), settings, plan, Group(0, 1, device))


def unequal(base, device, count):
    """Micro batches of other values and lengths every time."""
    batch = recorded_batch(base)
    frames = batch.noised_BDT.shape[2]
    for number in range(count):
        lengths = torch.tensor([[frames - number % 3], [frames - 5 * (number % 4)]])
        keep_BT = torch.arange(frames)[None] < lengths
        yield dataclasses.replace(shifted(batch, number), keep_BT=keep_BT, packing=Packing.of(keep_BT)).to(device)


def train(trainer, device, steps):
    """Losses, the last step's gradient, and the adapters afterwards."""
    batches = unequal(trainer.base, device, steps * ACCUMULATION)
    losses = [trainer.take_step(batches, StopRequest())["loss"] for _ in range(steps)]
    values = torch.cat([value.flatten() for value in trainer.engine.adapters().values()])
    return losses, trainer.engine.flat.gradient.clone(), values


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora-rows", "dora-cols", "bora", "bora-xs"])
def test_a_step_with_formed_weights_is_the_factored_one(device, kind, precision):
    (loss, formed, _), (expected_loss, factored, _) = (
        train(make_trainer(device, kind, precision, products), device, 1) for products in ("formed", "factored")
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5 if precision == "no" else 0.02)
    assert relative_error(formed, factored) < (1e-4 if precision == "no" else 0.1)


@pytest.mark.parametrize(
    ("kind", "precision", "recomputed", "products"),
    [
        ("dora-rows", "bf16", False, "formed"),
        ("dora-rows", "no", True, "formed"),
        ("bora", "bf16", True, "formed"),
        ("dora-cols", "bf16", True, "per_use"),
        ("dora-rows", "no", True, "per_use"),
    ],
)
def test_a_run_over_unequal_lengths_with_ladder_compiler_and_graphs_is_the_plain_run(
    device, kind, precision, recomputed, products, record_property
):
    torch._dynamo.reset()
    plain, quick = make_trainer(device, kind, precision), make_trainer(device, kind, precision, products)
    on_cuda, dit = device.type == "cuda", quick.base.dit
    quick.base.gradient_checkpointing = recomputed
    quick.ladder = ShapeLadder(recorded_batch(quick.base).noised_BDT.shape[2], dit.transformer.memory)
    compile_blocks(dit, "inductor" if on_cuda else "aot_eager")
    quick.record_graphs(Recorder(device) if on_cuda else HostRecorder())
    steps = 6
    (losses, gradient, values), (expected_losses, expected, expected_values) = (
        train(trainer, device, steps) for trainer in (quick, plain)
    )
    assert quick.graphs.shapes > 0, "no replay was found equal: see the warning"
    assert losses == pytest.approx(expected_losses, rel=1e-4 if precision == "no" else 5e-3)
    distance = relative_error(gradient, expected)
    record_property("gradient_distance", distance)
    assert distance < (1e-2 if precision == "no" else 0.1)
    # The sign of a gradient that is all rounding moves an entry by one learning rate a step.
    moved = (values - expected_values).abs()
    assert moved.max() <= 2.1 * steps * StepSettings().learning_rate
    assert moved.mean() <= 0.2 * StepSettings().learning_rate
