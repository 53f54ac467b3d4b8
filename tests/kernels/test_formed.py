"""Formed weights in torch and in Triton's interpreter: W' and every gradient against float64 autograd through W'.

What only a GPU shows is in test_gpu_formed.py.
"""

import dataclasses

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES, share_statistics
from sa3dist_kernels.formed_weights import FormedWeights

from tests.helpers.formed_layers import (
    assert_close,
    check_formed,
    check_gradients,
    check_layers,
    check_step,
    make_cases,
)

pytest.importorskip("triton")
from sa3dist_kernels import triton_support  # noqa: E402
from sa3dist_kernels.formed_blocks import ResidentTile, interpreter_tiles  # noqa: E402

NINE = tuple(ADAPTER_TYPES)
needs_interpreter = pytest.mark.skipif(
    not triton_support.interpreting(), reason="Triton was imported without its interpreter"
)
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=needs_interpreter)]


@pytest.fixture
def nan_memory(monkeypatch):
    """What is allocated holds NaN until it is written."""
    empty = torch.empty

    def filled(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NINE)
def test_weights_and_gradients_of_three_micro_batches_are_autograds_through_the_effective_weight(name, impl):
    check_layers(ADAPTER_TYPES[name], [(23, 19), (17, 32), (23, 19)], 3, torch.float32, impl)


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", ["dora-cols", "bora", "dora-rows-xs"])
def test_products_in_float16_round_the_weights_and_not_the_gradients(name):
    check_layers(ADAPTER_TYPES[name], [(23, 19)], 3, torch.float16, "triton")


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("name", "rank"), [("bora", 1), ("dora-rows-xs", 16), ("bora", 40), ("bora-xs", 40)])
def test_any_rank_is_taken_in_steps(name, rank):
    check_layers(ADAPTER_TYPES[name], [(18, 17)], rank, torch.float32, "triton")


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("name", "size"), [("lora", (1, 1)), ("lora-xs", (1, 33)), ("dora-rows", (1, 33)), ("dora-cols", (33, 1))]
)
def test_layers_of_a_single_row_or_column_are_taken(name, size):
    cases, _ = make_cases(ADAPTER_TYPES[name], [size], 2, odd=False)
    check_step(cases, torch.float32, "triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["dora-rows", "dora-cols", "bora"])
def test_norms_may_be_as_small_as_eps_and_as_large_as_ten_to_the_twelve(name, impl):
    kind = ADAPTER_TYPES[name]
    cases, _ = make_cases(kind, [(23, 19)], 3, odd=False)
    spec = cases[0].spec
    sizes = torch.logspace(-12, 12, 23)[:, None] if kind.rows else torch.logspace(-12, 12, 19)
    spec.weight_OI.mul_(sizes)
    spec.params["lora_B" if kind.rows else "lora_A"].mul_(sizes)
    formed = FormedWeights([spec], torch.float32, impl)
    formed.form()
    cases[0].load(cases[0].sums())
    formed.finish()
    for key, expected in cases[0].gradients().items():
        # A gradient is as large as its row's or column's norm is small, so each is compared by itself.
        along = {"lora_B": 1, "lora_A": 0}.get(key)
        size = expected.abs() if along is None else expected.norm(dim=along, keepdim=True)
        error = ((spec.grads[key].double() - expected) / size).abs().max()
        assert error < 64 * torch.finfo(torch.float32).eps, key


@needs_interpreter
@pytest.mark.parametrize(("name", "scale"), [("dora-rows", 1e4), ("bora", 0.0), ("bora-xs", -2.0)])
def test_any_scale_of_the_update_is_taken(name, scale):
    cases, _ = make_cases(ADAPTER_TYPES[name], [(23, 19)], 3, scale)
    check_step(cases, torch.float32, "triton")


@needs_interpreter
@pytest.mark.parametrize("name", ["lora", "bora", "bora-xs"])
def test_a_fresh_adapter_whose_update_is_zero_gets_its_gradients(name):
    kind = ADAPTER_TYPES[name]
    cases, _ = make_cases(kind, [(23, 19)], 3)
    cases[0].spec.params["M_xs" if kind.xs else "lora_B"].zero_()
    check_step(cases, torch.float32, "triton")


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
def test_rank_256_is_taken():
    check_layers(ADAPTER_TYPES["dora-rows"], [(18, 17)], 256, torch.float32, "triton")


@needs_interpreter
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("name", "rank"), [("dora-rows", 3), ("dora", 16)])
def test_rows_that_are_kept_in_registers_are_formed_as_those_read_twice(name, rank):
    tiles = dataclasses.replace(interpreter_tiles(rank), form_resident=ResidentTile(16, 2))
    # Two blocks and four, the last of nine rows; (17, 64) would fit too, but fewer numbers have its width.
    sizes = [(23, 128), (17, 64), (57, 128), (18, 19)]
    check_layers(ADAPTER_TYPES[name], sizes, rank, torch.bfloat16, "triton", gradient=torch.bfloat16, tiles=tiles)


@needs_interpreter
@pytest.mark.parametrize("name", ["dora-rows", "bora"])
def test_bfloat16_takes_its_own_format_for_the_norms_part_alone(name):
    # The interpreter cuts bfloat16's last bits off instead of rounding: twice the error.
    check_layers(ADAPTER_TYPES[name], [(23, 19)], 3, torch.bfloat16, "triton", gradient=torch.bfloat16)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["dora-rows", "bora", "bora-xs"])
def test_gradients_of_a_sum_are_the_sum_of_gradients(name, impl):
    cases, gradient = make_cases(ADAPTER_TYPES[name], [(23, 19)], 3)
    formed = FormedWeights([cases[0].spec], torch.float32, impl)
    formed.form()
    total = torch.zeros_like(gradient)
    for batch in cases[0].batches:
        cases[0].load(cases[0].sums([batch]))
        formed.finish()
        total += gradient
    cases[0].load(cases[0].sums())
    formed.finish()
    assert_close(total, gradient.double(), torch.finfo(torch.float32).eps, name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["dora-rows", "dora-cols", "bora", "bora-xs"])
def test_passes_with_the_weights_themselves_give_the_gradients_of_a_step(name, impl):
    # z and dx from the formed W', as a layer has them, so that gains below the floor pass through it.
    cases, _ = make_cases(ADAPTER_TYPES[name], [(23, 19)], 3)
    case, formed = cases[0], FormedWeights([cases[0].spec], torch.float32, impl)
    formed.form()
    weight, left, right = (value.double() for value in vars(formed.layers[0]).values())
    for value in case.spec.grads.values():
        value.zero_()
    for x, dy in case.batches:
        inner, outer = x @ right.t(), dy @ left
        if case.spec.kind.xs:
            case.spec.grads["M_xs"] += outer.t() @ inner
        else:
            case.spec.grads["lora_B"] += dy.t() @ inner
            case.spec.grads["lora_A"] += outer.t() @ x
        if case.spec.kind.rows:
            case.spec.grads[case.spec.kind.row_magnitude] += (dy * (x @ weight.t())).sum(0)
        if case.spec.kind.cols:
            case.spec.grads[case.spec.kind.col_magnitude] += (x * (dy @ weight)).sum(0)
    formed.finish()
    check_gradients(cases)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_zero_row_with_a_magnitude_and_a_nan_keep_to_themselves(impl):
    kind = ADAPTER_TYPES["dora-rows"]
    cases, _ = make_cases(kind, [(23, 19)], 3, odd=False)
    spec = cases[0].spec
    spec.weight_OI[7], spec.params["lora_B"][7] = 0, 0
    expected = cases[0].gradients()
    sums = cases[0].sums()
    cases[0].load(sums)
    formed = FormedWeights([spec], torch.float32, impl)
    formed.form()
    formed.finish()
    eps = torch.finfo(torch.float32).eps
    others = torch.arange(23) != 7
    assert spec.grads["magnitude"][7] == 0
    # Its gain is the magnitude over 1e-12, and so is its gradient.
    assert expected["lora_B"][7].norm() > 1e10
    assert_close(spec.grads["lora_B"][7], expected["lora_B"][7], eps, "the zero row")
    assert_close(spec.grads["lora_B"][others], expected["lora_B"][others], eps, "the others")
    spec.params["magnitude"][5] = float("nan")
    formed.form()
    bad = formed.layers[0].weight_OI.isnan()
    assert bad[5].all()
    assert not bad[torch.arange(23) != 5].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_and_storage_may_change_between_steps(impl):
    kind = ADAPTER_TYPES["bora"]
    cases, _ = make_cases(kind, [(23, 19), (17, 32)], 3)
    formed = FormedWeights([case.spec for case in cases], torch.float32, impl)
    formed.form()
    held = formed.layers[0].weight_OI
    # What shares its memory moves together; a weight alone.
    for case in cases:
        for value in case.spec.params.values():
            value.set_(value * 0.5)
    weight = cases[1].spec.weight_OI
    weight.set_(weight * 1.5)
    for case in cases:
        case.load(case.sums())
    formed.form()
    check_formed(cases, formed, torch.float32)
    formed.finish()
    check_gradients(cases)
    assert formed.layers[0].weight_OI is held


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["dora-rows", "bora-xs"])
def test_layers_formed_in_turn_in_one_memory_leave_each_others_gradients_alone(name, impl):
    blocks = [make_cases(ADAPTER_TYPES[name], [size], 3)[0] for size in ((23, 19), (17, 32))]
    memory = torch.full((2000,), float("nan"))
    made = [FormedWeights([cases[0].spec], torch.float32, impl, memory=memory) for cases in blocks]
    for _ in range(2):
        for cases, formed in zip(blocks, made, strict=True):
            formed.form()
            check_formed(cases, formed, torch.float32)
            assert formed.layers[0].weight_OI.data_ptr() == memory.data_ptr()
    for cases, formed in zip(blocks, made, strict=True):
        cases[0].load(cases[0].sums())
        formed.finish()
        check_gradients(cases)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["bora", "dora-cols-xs"])
def test_layers_finished_before_others_are_formed_may_share_everything(name, impl):
    blocks = [make_cases(ADAPTER_TYPES[name], [size, (9, 8)], 3)[0] for size in ((23, 19), (17, 32))]
    memory = torch.full((2000,), float("nan"))
    made = [FormedWeights([case.spec for case in of], torch.float32, impl, memory=memory) for of in blocks]
    for formed in made:
        # Made before the statistics move.
        formed.form()
    share_statistics(made)
    kept = {group.floats.untyped_storage().data_ptr() for formed in made for group in formed.forms.groups}
    assert len(kept) == (impl == "triton")
    for cases, formed in zip(blocks, made, strict=True):
        formed.form()
        for case in cases:
            case.load(case.sums())
        formed.finish()
        check_gradients(cases)


def test_specs_that_do_not_fit_are_refused_by_name():
    first, _ = make_cases(ADAPTER_TYPES["dora-rows"], [(5, 6)], 2, odd=False)
    other, _ = make_cases(ADAPTER_TYPES["dora-rows"], [(5, 6)], 3, odd=False)
    with pytest.raises(ValueError, match="dora-rows rank 3 among dora-rows layers of rank 2"):
        FormedWeights([first[0].spec, other[0].spec], torch.float32)
    spread = dataclasses.replace(first[0].spec, grads=first[0].spec.grads | {"lora_A": torch.zeros(6, 2).t()})
    with pytest.raises(ValueError, match=r"lora_A is of shape \(2, 6\) and strides \(1, 2\), expected contiguous"):
        FormedWeights([spread], torch.float32)
    with pytest.raises(ValueError, match="expected one of auto, triton, torch"):
        FormedWeights([first[0].spec], torch.float32, "cuda")
