"""Adapters on the real transformer: initial values, what they leave alone, what they promise about precision."""

import copy

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES
from safetensors.torch import load_file
from torch import nn

from sa3dist.adapters import (
    adapted_layers,
    adapter_parameters,
    attach_adapter,
    detach_adapter,
    effective_weight,
    set_strength,
)
from sa3dist.adapters.layers import AdaptedLayer, initial_adapter
from sa3dist.adapters.svd_bases import singular_bases
from sa3dist.errors import ConfigError
from tests.helpers.adapter_base import RecordedBase, adapter_digest, forward_inputs, move
from tests.helpers.golden import golden

NINE = tuple(ADAPTER_TYPES)
RECORDED = {"linear_48_80_r8": 8.0, "conv1d_32_32_k1_r4": 10.0}


@pytest.fixture
def base():
    return RecordedBase()


def recorded_module(file, name, strength=1.0):
    """A module as attach_adapter makes it, holding the recorded parameters; and everything recorded about it."""
    tensors = load_file(golden(f"adapters/{file}.safetensors"))
    kind, weight = ADAPTER_TYPES[name], tensors["W0"]
    fan_out, fan_in = weight.shape[:2]
    layer = nn.Conv1d(fan_in, fan_out, 1, bias="bias" in tensors) if weight.ndim == 3 else nn.Linear(fan_in, fan_out)
    layer.load_state_dict({"weight": weight, **({"bias": tensors["bias"]} if "bias" in tensors else {})})
    layer.requires_grad_(False)
    own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    rank = own["M_xs" if kind.xs else "lora_A"].shape[0]
    # The recorded bases: those of a float32 SVD, which another machine does not find again.
    adapter = initial_adapter(kind, rank, weight, torch.Generator().manual_seed(0), lambda *_: (own["U"], own["V"]))
    module = AdaptedLayer(layer, kind, adapter, RECORDED[file] / rank)
    module.strength = strength
    return module, own, {**tensors, **own}


@pytest.mark.parametrize("file", RECORDED)
@pytest.mark.parametrize("name", NINE)
def test_a_module_with_recorded_parameters_gives_recorded_outputs_gradients_and_weights(file, name):
    module, own, recorded = recorded_module(file, name)
    with torch.no_grad():
        for key, parameter in module.trained().items():
            parameter.copy_(own[key])
    x = recorded["x"].clone().requires_grad_()
    y = module(x)
    close = {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(y, own["y"], **close)
    y.backward(recorded["dy"])
    torch.testing.assert_close(x.grad, own["grad.x"], **close)
    for key, parameter in module.trained().items():
        torch.testing.assert_close(parameter.grad, own[f"grad.{key}"], **close)
    assert module.weight.grad is None
    weight = recorded["W0"]
    torch.testing.assert_close(module.effective_weight(weight), own["W_eff"], **close)
    module.strength = 0.5
    torch.testing.assert_close(module.effective_weight(weight), own["W_eff_strength_0.5"], **close)
    module.strength = 0.0
    assert torch.equal(module.effective_weight(weight), weight)
    torch.testing.assert_close(module(x), module.original(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("file", RECORDED)
@pytest.mark.parametrize("name", [name for name in NINE if name not in ("lora", "lora-xs")])
def test_initial_magnitudes_are_the_recorded_ones(file, name):
    module, own, _ = recorded_module(file, name)
    keys = [key for key in module.trained() if key.startswith("magnitude")]
    assert keys
    for key in keys:
        torch.testing.assert_close(module.trained()[key].detach(), own[f"init.{key}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("file", RECORDED)
def test_singular_bases_and_their_signs_are_the_recorded_ones(file):
    recorded = load_file(golden(f"adapters/{file}.safetensors"))
    rank = recorded["lora-xs/M_xs"].shape[0]
    left, right = singular_bases(recorded["W0"].flatten(1), rank)
    torch.testing.assert_close(left, recorded["lora-xs/U"], rtol=0, atol=1e-5)
    torch.testing.assert_close(right, recorded["lora-xs/V"], rtol=0, atol=1e-5)


def test_the_largest_entry_of_every_left_vector_is_positive():
    weight = torch.randn(30, 20)
    left, right = singular_bases(weight, 20)
    flipped = singular_bases(-weight, 20)
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(flipped[0], left, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flipped[1], -right, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_norm(left.t() @ weight @ right - torch.linalg.svdvals(weight).diag()) < 1e-4


@pytest.mark.parametrize("rank", [3, 8])
def test_of_entries_of_equal_size_the_first_is_positive(rank):
    # Left vectors of a Hadamard matrix: all entries are of one size, and rounding would choose among them.
    hadamard = torch.tensor([[1.0]])
    for _ in range(3):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    left, _ = singular_bases(-hadamard * torch.arange(8, 0, -1) @ hadamard, rank)
    torch.testing.assert_close(left, hadamard[:, :rank] / 8**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NINE)
def test_a_fresh_adapter_leaves_the_output_as_it_was(base, name):
    inputs = forward_inputs(base)
    before = base(*inputs)
    attach_adapter(base, name, rank=4)
    after = base(*inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    move(base)
    assert (base(*inputs) - before).norm() > 1e-2 * before.norm()


def test_lora_a_is_uniform_within_one_over_root_fan_in(base):
    attach_adapter(base, "lora", rank=16)
    name = "conditioners.seconds_total.embedder.embedding.1"
    down = adapter_parameters(base)[f"{name}.parametrizations.weight.0.lora_A"].detach()
    assert down.shape == (16, 256)
    assert down.abs().max() <= 1 / 16
    assert abs(down.std() * 16 - 3**-0.5) < 0.02
    assert not adapter_parameters(base)[f"{name}.parametrizations.weight.0.lora_B"].any()


def test_initial_values_depend_on_seed_and_layer_name_alone(base):
    attach_adapter(base, "lora", rank=4, seed=7)
    everything = {key: value.detach().clone() for key, value in adapter_parameters(base).items()}
    torch.rand(5)
    part, other = RecordedBase(), RecordedBase()
    attach_adapter(part, "lora", rank=4, include=["ff", "to_qkv"], exclude=["layers.0."], seed=7)
    attach_adapter(other, "lora", rank=4, seed=8)
    chosen = adapter_parameters(part)
    assert 0 < len(chosen) < len(everything)
    assert all(torch.equal(everything[key], value) for key, value in chosen.items())
    downs = [key for key in everything if key.endswith("lora_A")]
    assert not any(torch.equal(everything[key], adapter_parameters(other)[key]) for key in downs)
    shapes = [key for key in downs if everything[key].shape == (4, 64)]
    assert not torch.equal(everything[shapes[0]], everything[shapes[1]])


def test_only_adapters_learn_and_the_base_keeps_its_keys_and_bits(base):
    keys = set(base.state_dict())
    attach_adapter(base, rank=4)
    trainable = {name for name, value in base.named_parameters() if value.requires_grad}
    assert trainable == {
        f"{'conditioner' if key.startswith('cond') else 'model'}.{key}" for key in adapter_parameters(base)
    }
    optimiser = torch.optim.AdamW(adapter_parameters(base).values(), lr=0.1)
    for _ in range(2):
        base(*forward_inputs(base)).square().sum().backward()
        optimiser.step()
    after = base.state_dict()
    assert set(after) == keys | trainable
    assert all(torch.equal(after[key], base.recorded[key]) for key in keys)
    # The recorded model has one context token, over which the two softmaxes of differential attention cancel.
    still = [key for key, value in adapter_parameters(base).items() if not value.grad.any()]
    assert [key for key in still if "cross_attn" not in key] == []


@pytest.mark.parametrize("name", ["dora-rows", "bora-xs"])
def test_a_bfloat16_base_keeps_float32_adapters_made_from_float32_weights(base, name):
    attach_adapter(base, name, rank=4)
    move(base)
    expected = {key: value.detach().clone() for key, value in adapter_parameters(base).items()}
    constants = [layer.adapter.frozen for layer in adapted_layers(base).values()]
    inputs = forward_inputs(base)
    exact = base(*inputs)
    base.to(torch.bfloat16)
    assert all(torch.equal(value, expected[key]) for key, value in adapter_parameters(base).items())
    for before, layer in zip(constants, adapted_layers(base).values(), strict=True):
        assert torch.equal(before.row_squares_O, layer.adapter.frozen.row_squares_O)
        assert layer.weight.dtype == torch.bfloat16
    rough = base(*forward_inputs(base, torch.bfloat16))
    assert (rough - exact).norm() < 0.03 * exact.norm()


def test_a_base_cast_to_bfloat16_first_gets_the_same_adapter(base):
    narrow = RecordedBase()
    # Weights bfloat16 cannot hold: norms and bases must come from the checkpoint, not from the module.
    finer = {key: value * 1.0001 for key, value in base.recorded.items()}
    for model in (base, narrow):
        model.recorded = finer
        model.load_state_dict(finer)
    narrow.to(torch.bfloat16)
    attach_adapter(base, "bora-xs", rank=4)
    attach_adapter(narrow, "bora-xs", rank=4)
    assert adapter_digest(base) == adapter_digest(narrow)
    for a, b in zip(adapted_layers(base).values(), adapted_layers(narrow).values(), strict=True):
        assert torch.equal(a.adapter.frozen.left_OR, b.adapter.frozen.left_OR)


def test_effective_weights_are_what_the_layers_compute(base):
    attach_adapter(base, "bora", rank=4, include=["layers.0", "conv"])
    move(base)
    expected = base(*forward_inputs(base))
    merged = RecordedBase()
    for name in adapted_layers(base):
        weight = effective_weight(base, name)
        assert weight.dtype == torch.float32
        merged.model.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(merged(*forward_inputs(base)), expected, rtol=1e-4, atol=1e-5)
    untouched = "model.transformer.layers.1.ff.ff.2"
    assert torch.equal(effective_weight(base, untouched), base.fp32_weight(untouched))
    with pytest.raises(ConfigError, match="'model.nothing' is not an adaptable layer; names look like model"):
        effective_weight(base, "model.nothing")


def test_strength_zero_is_the_base_and_one_is_the_adapter(base):
    inputs = forward_inputs(base)
    before = base(*inputs)
    attach_adapter(base, rank=4)
    move(base)
    adapted = base(*inputs)
    set_strength(base, 0.0)
    torch.testing.assert_close(base(*inputs), before, rtol=1e-6, atol=1e-6)
    set_strength(base, 0.5)
    half = base(*inputs)
    assert (half - before).norm() > 1e-3
    assert (half - adapted).norm() > 1e-3
    set_strength(base, 1.0)
    assert torch.equal(base(*inputs), adapted)
    for strength in ("nan", "inf", "-1e7"):
        with pytest.raises(ConfigError, match=f"strength is {float(strength)}, expected a number up to 1000000"):
            set_strength(base, float(strength))


def test_detaching_restores_the_very_layers_and_a_second_adapter_is_refused(base):
    before = dict(base.named_modules())
    attach_adapter(base, rank=4)
    with pytest.raises(ConfigError, match="attached already"):
        attach_adapter(base, rank=4)
    detach_adapter(base)
    assert all(module is before[name] for name, module in base.named_modules())
    assert adapter_parameters(base) == {}
    attach_adapter(base, "lora", rank=2)
    assert len(adapter_parameters(base)) == 2 * 31


def test_the_digest_is_of_the_values(base):
    attach_adapter(base, rank=4)
    twin = copy.deepcopy(base)
    assert adapter_digest(twin) == adapter_digest(base)
    with torch.no_grad():
        list(adapter_parameters(twin).values())[-1].view(-1)[-1] += 1e-6
    assert adapter_digest(twin) != adapter_digest(base)


def test_an_attachment_that_fails_halfway_leaves_the_base_as_it_was(base, monkeypatch):
    read, seen = base.fp32_weight, []

    def fail_at_the_sixth(name, device):
        seen.append(name)
        if len(seen) == 6:
            raise OSError("no more")
        return read(name)

    monkeypatch.setattr(base, "fp32_weight", fail_at_the_sixth)
    with pytest.raises(OSError, match="no more"):
        attach_adapter(base, rank=4)
    assert adapted_layers(base) == {}
    monkeypatch.undo()
    attach_adapter(base, rank=4)
    assert len(adapted_layers(base)) > 6
