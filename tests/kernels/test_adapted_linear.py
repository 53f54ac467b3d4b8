"""The factored op against recorded reference tensors and against autograd through the materialised weight."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sa3dist_kernels import (
    ADAPTER_TYPES,
    adapted_linear,
    effective_weight_reference,
    frozen_constants,
    frozen_linear,
    frozen_products,
)
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.helpers.golden import golden
from tests.helpers.layer_cases import (
    make_layer,
    materialised,
    relative_error,
    values_and_gradients,
    zero_a_row_and_a_column,
)

NINE = tuple(ADAPTER_TYPES)
# Recorded with these alpha / rank; tolerances are the recording's own suggestion.
RECORDED = {"linear_48_80_r8": 1.0, "conv1d_32_32_k1_r4": 2.5}
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def cancellation(weight, params, kind, scale, frozen):
    """How many times longer, in squares, a row or column of W0 is than that of W0 + s L R: lost digits, 1 for none."""
    merged = effective_weight_reference(
        weight, params, dataclasses.replace(kind, rows=False, cols=False), scale, frozen
    )
    ratios = [weight.square().sum(axis) / merged.detach().square().sum(axis) for axis in (0, 1)]
    return max(1.0, *(float(ratio.max()) for ratio in ratios))


def recorded_layer(file, name):
    tensors = load_file(golden(f"adapters/{file}.safetensors"))
    kind = ADAPTER_TYPES[name]
    weight = tensors["W0"]
    own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    rank = own["M_xs" if kind.xs else "lora_A"].shape[0]
    shapes = kind.parameter_shapes(*weight.flatten(1).shape, rank)
    params = {key: own[key].clone().requires_grad_() for key in shapes}
    frozen = frozen_constants(weight, own.get("U"), own.get("V"))
    x, dy = own.get("x", tensors.get("x")), own.get("dy", tensors.get("dy"))
    return kind, weight, tensors.get("bias"), params, frozen, own, x, dy


@pytest.mark.parametrize("file", RECORDED)
@pytest.mark.parametrize("name", NINE)
def test_recorded_outputs_and_every_gradient_are_met(file, name):
    kind, weight, bias, params, frozen, own, x, dy = recorded_layer(file, name)
    channels_first = weight.ndim == 3
    x = x.clone().requires_grad_()
    tokens = x.transpose(1, 2) if channels_first else x
    y = adapted_linear(tokens, weight, bias, params, kind, RECORDED[file], frozen=frozen)
    y = y.transpose(1, 2) if channels_first else y
    torch.testing.assert_close(y, own["y"], **CLOSE)
    gradients = torch.autograd.grad(y, [x, *params.values()], dy)
    for key, gradient in zip(["x", *params], gradients, strict=True):
        torch.testing.assert_close(gradient, own[f"grad.{key}"], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("file", RECORDED)
@pytest.mark.parametrize("name", NINE)
def test_recorded_effective_weights_are_met_at_full_and_half_strength(file, name):
    kind, weight, _, params, frozen, own, _, _ = recorded_layer(file, name)
    for strength, key in ((1.0, "W_eff"), (0.5, "W_eff_strength_0.5")):
        merged = effective_weight_reference(weight, params, kind, strength * RECORDED[file], frozen)
        torch.testing.assert_close(merged.detach(), own[key], **CLOSE)


@pytest.mark.parametrize("name", NINE)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_factored_form_is_the_materialised_form_in_float64(name, data):
    kind = ADAPTER_TYPES[name]
    fan_out, fan_in = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    rank = data.draw(st.integers(1, min(fan_out, fan_in)))
    tokens = data.draw(st.integers(0, 50))
    scale = data.draw(st.sampled_from([0.01, 0.5, 1.0, 2.5, -1.0]))
    bias, seed = data.draw(st.booleans()), data.draw(st.integers(0, 2**31))
    weight, bias, params, frozen, x, dy = make_layer(kind, tokens, fan_out, fan_in, rank, bias, seed=seed)
    # Gradients far below and far above 1.
    dy *= data.draw(st.sampled_from([1e-6, 1.0, 1e6]))
    got = values_and_gradients(
        lambda: adapted_linear(x, weight, bias, params, kind, scale, frozen=frozen), x, params, dy
    )
    expected = values_and_gradients(lambda: materialised(x, weight, bias, params, kind, scale, frozen), x, params, dy)
    # Where all terms of a gradient cancel (one row, one column) only the absolute error means anything.
    limit = 1e-12 * cancellation(weight, params, kind, scale, frozen)
    floor = limit * max(float(value.detach().norm()) for value in expected[1:])
    for key, ours, theirs in zip(["y", "x", *params], got, expected, strict=True):
        assert relative_error(ours, theirs) < limit or float((ours - theirs).norm()) < floor, key


@pytest.mark.parametrize("name", NINE)
@pytest.mark.parametrize("factor", [2.0**-30, 2.0**30])
def test_gradients_grow_with_what_they_are_asked_for_to_the_last_bit(name, factor):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, dy = make_layer(kind, 7, 9, 8, 3, dtype=torch.float32)

    def run():
        return adapted_linear(x, weight, bias, params, kind, 0.7, frozen=frozen)

    y, *whole = values_and_gradients(run, x, params, dy)
    again, *scaled = values_and_gradients(run, x, params, factor * dy)
    assert torch.equal(y, again)
    # A power of two changes no digit; a clipping, or an epsilon beside a gradient, would.
    assert all(torch.equal(factor * one, other) for one, other in zip(whole, scaled, strict=True))


@pytest.mark.parametrize("name", NINE)
def test_gradients_pass_gradcheck(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, _ = make_layer(kind, 3, 5, 4, 2)

    def run(x, *values):
        return adapted_linear(x, weight, bias, dict(zip(params, values, strict=True)), kind, 0.7, frozen=frozen)

    assert torch.autograd.gradcheck(run, (x, *params.values()))


@pytest.mark.parametrize("name", NINE)
def test_zero_rows_and_columns_give_zero_gradients_and_no_nan(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, _, x, dy = make_layer(kind, 6, 9, 7, 3)
    weight[4], weight[:, 2] = 0, 0
    left, right = torch.randn(9, 3).double(), torch.randn(7, 3).double()
    left[4], right[2] = 0, 0
    frozen = frozen_constants(weight, *((left, right) if kind.xs else ()))
    zero_a_row_and_a_column(kind, params)
    values = values_and_gradients(
        lambda: adapted_linear(x, weight, bias, params, kind, 1.3, frozen=frozen), x, params, dy
    )
    assert all(value.isfinite().all() for value in values)
    gradients = dict(zip(params, values[2:], strict=True))
    if kind.rows:
        assert gradients[kind.row_magnitude][4] == 0
        assert torch.equal(values[0][:, 4], bias[4].expand(6))
    if kind.rows and not kind.xs:
        assert not gradients["lora_B"][4].any()
    if kind.cols:
        assert gradients[kind.col_magnitude][2] == 0
        assert not values[1][:, 2].any()


def test_row_gradient_does_not_see_the_length_of_a_row():
    kind = ADAPTER_TYPES["dora-rows"]
    weight, bias, params, _, x, dy = make_layer(kind, 20, 12, 9, 3)
    # Through a full-rank update, dL/dV is dL/dB: B = s D, A = 1.
    params["lora_A"] = torch.eye(9).double().requires_grad_()
    params["lora_B"] = torch.randn(12, 9).double().requires_grad_()
    y = adapted_linear(x, weight, bias, params, kind, 1.0)
    (gradient,) = torch.autograd.grad(y, [params["lora_B"]], dy)
    inner = (gradient * (weight + params["lora_B"])).sum(1)
    assert inner.abs().max() < 1e-12 * gradient.norm() * weight.norm()


def test_a_common_factor_of_boras_row_magnitudes_has_no_gradient():
    kind = ADAPTER_TYPES["bora"]
    weight, bias, params, _, x, dy = make_layer(kind, 20, 12, 9, 3)
    y = adapted_linear(x, weight, bias, params, kind, 0.8)
    (gradient,) = torch.autograd.grad(y, [params["magnitude_r"]], dy)
    inner = (gradient * params["magnitude_r"]).sum()
    assert abs(inner.item()) < 1e-12 * (gradient.norm() * params["magnitude_r"].norm()).item()


@pytest.mark.parametrize("name", NINE)
def test_leading_axes_and_strides_do_not_matter(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, dy = make_layer(kind, 24, 10, 6, 3)
    flat = adapted_linear(x, weight, bias, params, kind, 1.0, frozen=frozen)
    strided = x.detach().view(2, 3, 4, 6).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).requires_grad_()
    assert not strided.is_contiguous()
    y = adapted_linear(strided, weight, bias, params, kind, 1.0, frozen=frozen)
    torch.testing.assert_close(y.reshape(24, 10), flat)
    (from_strided,) = torch.autograd.grad(y, strided, dy.view(2, 3, 4, 10))
    (from_flat,) = torch.autograd.grad(flat, x, dy)
    torch.testing.assert_close(from_strided.reshape(24, 6), from_flat)


@pytest.mark.parametrize("name", NINE)
def test_any_subset_of_gradients_is_the_same_as_all_of_them(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, dy = make_layer(kind, 8, 10, 6, 3)
    leaves = {"x": x, **params}
    y = adapted_linear(x, weight, bias, params, kind, 1.0, frozen=frozen)
    everything = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    for wanted in (["x"], list(params), list(params)[-1:]):
        for key, leaf in leaves.items():
            leaf.requires_grad_(key in wanted)
        y = adapted_linear(x, weight, bias, params, kind, 1.0, frozen=frozen)
        gradients = torch.autograd.grad(y, [leaves[key] for key in wanted], dy)
        for key, gradient in zip(wanted, gradients, strict=True):
            torch.testing.assert_close(gradient, everything[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["lora", "dora-rows", "bora-xs"])
def test_recomputation_under_checkpointing_changes_no_bit(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, dy = make_layer(kind, 8, 10, 6, 3, dtype=torch.float32)

    def run(x):
        return adapted_linear(x, weight, bias, params, kind, 1.0, frozen=frozen)

    plain = values_and_gradients(lambda: run(x), x, params, dy)
    recomputed = values_and_gradients(lambda: checkpoint(run, x, use_reentrant=False), x, params, dy)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


class LargestResult(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() != self.frozen:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("name", [name for name in NINE if not name.startswith("bora")])
def test_nothing_of_the_weights_size_is_ever_made(name):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, dy = make_layer(kind, 5, 120, 90, 4, dtype=torch.float32)
    with LargestResult() as largest:
        largest.frozen = weight.untyped_storage().data_ptr()
        y = adapted_linear(x, weight, bias, params, kind, 1.0, frozen=frozen)
        torch.autograd.grad(y, [x, *params.values()], dy)
    # Tokens and ranks by the longer side, with room for both together: 120 x 90 would be 12 times as much.
    assert 0 < largest.elements <= 120 * (5 + 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NINE)
def test_autocast_stays_close_to_float32_and_keeps_float32_gradients(name, dtype):
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, dy = make_layer(kind, 32, 48, 40, 4, dtype=torch.float32)
    weight = weight.to(dtype)
    exact = values_and_gradients(
        lambda: adapted_linear(x, weight.float(), bias, params, kind, 0.5, frozen=frozen), x, params, dy
    )

    def run():
        with torch.autocast("cpu", dtype=dtype):
            return adapted_linear(x, weight, bias, params, kind, 0.5, frozen=frozen)

    rough = values_and_gradients(run, x, params, dy.to(dtype))
    assert rough[0].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in rough[1:])
    # Input, output and upstream gradient are rounded once each.
    assert all(relative_error(a.float(), b) < 3 * torch.finfo(dtype).eps for a, b in zip(rough, exact, strict=True))


@pytest.mark.parametrize("name", NINE)
def test_bfloat16_products_stay_close_to_float32_where_the_machine_has_them(name, monkeypatch):
    monkeypatch.setattr("sa3dist_kernels.frozen_products.cpu_multiplies", lambda dtype: True)
    kind = ADAPTER_TYPES[name]
    weight, bias, params, frozen, x, dy = make_layer(kind, 64, 48, 40, 4, dtype=torch.float32)
    weight, x, dy = weight.bfloat16(), x.detach().bfloat16().requires_grad_(), dy.bfloat16()
    exact = values_and_gradients(
        lambda: materialised(x.float(), weight.float(), bias, params, kind, 0.5, frozen), x, params, dy.float()
    )
    rough = values_and_gradients(
        lambda: adapted_linear(x, weight, bias, params, kind, 0.5, frozen=frozen), x, params, dy
    )
    assert rough[0].dtype == rough[1].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in rough[2:])
    eps = torch.finfo(torch.bfloat16).eps
    assert all(relative_error(a.float(), b.float()) < 4 * eps for a, b in zip(rough, exact, strict=True))


def test_backward_inside_autocast_gives_the_same_gradients_as_outside():
    kind = ADAPTER_TYPES["dora-rows"]
    weight, bias, params, frozen, x, dy = make_layer(kind, 32, 48, 40, 4, dtype=torch.float32)

    def gradients(inside):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = adapted_linear(x, weight, bias, params, kind, 0.5, frozen=frozen)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return torch.autograd.grad(y, [x, *params.values()], dy.bfloat16())

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_large_low_precision_weight_is_multiplied_block_by_block(dtype, monkeypatch):
    monkeypatch.setattr("sa3dist_kernels.frozen_products.BLOCK_ELEMENTS", 100)
    # Pieces of a few rows, as a weight of many megabytes is taken.
    monkeypatch.setattr("sa3dist_kernels.weight_norms._square_elements", lambda weight: 60)
    kind = ADAPTER_TYPES["bora"]
    weight, bias, params, _, x, dy = make_layer(kind, 11, 37, 23, 4)
    weight = weight.to(dtype)
    got = values_and_gradients(lambda: adapted_linear(x, weight, bias, params, kind, 1.0), x, params, dy)
    expected = values_and_gradients(
        lambda: materialised(x, weight.double(), bias, params, kind, 1.0, None), x, params, dy
    )
    # The frozen norms of a narrower weight are float32.
    limit = 1e-12 if dtype == torch.float64 else 1e-6
    assert all(relative_error(a, b) < limit for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_linear_is_a_linear_layer_without_weight_gradient(autocast):
    weight, bias, x = torch.randn(24, 16).bfloat16(), torch.randn(24).bfloat16(), torch.randn(3, 5, 16)
    dy = torch.randn(3, 5, 24).bfloat16()
    x = x.requires_grad_() if autocast else x.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = frozen_linear(x, weight, bias)
    (gradient,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == torch.bfloat16
    assert gradient.dtype == x.dtype
    exact = F.linear(x.detach().bfloat16().double(), weight.double(), bias.double())
    assert relative_error(y.double(), exact) < 0.004
    assert relative_error(gradient.double(), dy.double() @ weight.double()) < 0.004


@pytest.mark.parametrize("rows", [1, 17, 300])
@pytest.mark.parametrize("fan_out", [255, 256, 777])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_with_a_wide_frozen_weight_are_those_of_float64(dtype, fan_out, rows, monkeypatch):
    monkeypatch.setattr(frozen_products, "BLOCK_ELEMENTS", 400 * 40)
    generator = torch.Generator().manual_seed(fan_out + rows)
    left_KI = torch.randn(rows, 40, generator=generator, dtype=torch.float64)
    # Rows of a larger buffer, as a layer's weight lies in it where ranks share it out; and every other of its columns.
    buffer = torch.randn(fan_out + 2, 80, generator=generator, dtype=torch.float64).to(dtype)
    for weight_OI in (buffer[1:-1, ::2].contiguous(), buffer[1:-1, ::2]):
        product_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        found = frozen_products.times_transposed(left_KI.to(product_dtype), weight_OI)
        expected = left_KI @ weight_OI.double().t()
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert found.dtype == product_dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=10 * tolerance)
    assert frozen_products.times_transposed(left_KI[:0].to(product_dtype), weight_OI).shape == (0, fan_out)


def test_wrong_calls_say_what_is_wrong():
    kind = ADAPTER_TYPES["dora-rows"]
    weight, bias, params, frozen, x, _ = make_layer(kind, 3, 5, 4, 2)
    with pytest.raises(ValueError, match="impl='cuda', expected one of auto, torch, triton"):
        adapted_linear(x, weight, bias, params, kind, 1.0, frozen=frozen, impl="cuda")
    with pytest.raises(ValueError, match="3 features"):
        adapted_linear(x[:, :3], weight, bias, params, kind, 1.0, frozen=frozen)
    with pytest.raises(ValueError, match="frozen bases"):
        adapted_linear(x, weight, bias, {"M_xs": torch.ones(2, 2)}, ADAPTER_TYPES["lora-xs"], 1.0)
