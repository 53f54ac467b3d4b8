"""The count of a step's work and kept values, against torch's own counter and the tensors autograd really saves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from sa3dist.adapters import adapted_layers, adapter_parameters, attach_adapter
from sa3dist.adapters.formed import keep_formed
from sa3dist.cost_model import devices, flops
from sa3dist.cost_model.flops import Adapter, MicroBatch
from sa3dist.model import random_weights
from sa3dist.model.base import Base
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.released import released_config
from sa3dist.model.tiny import tiny_config
from sa3dist.parallel.flat_adamw import FlatAdapters
from sa3dist.training import memory
from tests.helpers.recorded_step import StepSettings

CLIPS, FRAMES, PROMPT = 2, 21, 9
FROZEN = Adapter(None, 0, frozenset())
# torch's counter knows the fused attention of GPUs only, and overlooks oneDNN's product and the one that adds in place.
ALSO_COUNTED = {
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: mm_flop(x, weight[::-1]),
    torch.ops.aten.addmm_: lambda _, a, b, *__, **___: mm_flop(a, b),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@pytest.fixture(params=["medium", "small"])
def base(request):
    config = parse_model_config(tiny_config(request.param, depth=2), request.param)
    weights = random_weights.RandomWeights(config, 1)
    return Base(config, weights, "cpu", torch.float32, text_source=None, encoder=False)


def velocity(base, clips, frames, prompt, learn=False):
    x = torch.randn(clips, base.latent_channels, frames, requires_grad=learn)
    hidden = torch.randn(clips, prompt, base.config.cond_dim, requires_grad=learn)
    t, seconds = (torch.full((clips,), value, requires_grad=learn) for value in (0.5, 9.0))
    return base.velocity(x, t, hidden, torch.ones(clips, prompt), seconds)


def batch_of(clips, frames, prompt):
    return MicroBatch((frames,) * clips, prompt + 1, prompt + 1)


def counted_flops(base, learn):
    with FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED) as counter:
        velocity(base, CLIPS, FRAMES, PROMPT, learn).sum().backward()
    return counter.get_total_flops()


def expected_flops(base, learn, recomputed=0):
    batch = batch_of(CLIPS, FRAMES, PROMPT)
    made = flops.count(base.config, batch, memory.adapter_of(base), 4, 4, inputs_learn=learn)
    return made.total(recomputed).flops


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_the_frozen_networks_operations_equal_torchs_own_count(base, recomputed):
    base.recomputed_blocks = recomputed
    assert counted_flops(base, learn=True) == expected_flops(base, True, recomputed)


@pytest.mark.parametrize(
    "include", [None, ["layers.0.ff", "layers.1.to_local"], ["to_cond_embed"], ["layers.0.to_local"]]
)
def test_a_loras_operations_equal_torchs_own_count_and_start_at_the_first_adapted_layer(base, include):
    attach_adapter(base, adapter_type="lora", rank=5, include=include)
    assert counted_flops(base, learn=False) == expected_flops(base, False)


@pytest.mark.parametrize("base", ["medium"], indirect=True)
@pytest.mark.parametrize("kind", ["dora-rows", "dora-cols", "bora", "lora-xs", "dora-rows-xs", "bora-xs"])
def test_other_types_operations_are_counted_but_for_small_squares(base, kind):
    attach_adapter(base, adapter_type=kind, rank=2)
    # Products of a rank x rank matrix with one factor are left out of the count.
    assert expected_flops(base, False) == pytest.approx(counted_flops(base, learn=False), rel=0.02)


def kept_bytes(base, clips, frames, prompt, others=()) -> int:
    """Bytes of distinct storages autograd saves, parameters, buffers and ``others`` by their address aside."""
    kept: dict[int, torch.UntypedStorage] = {}
    own = {value.untyped_storage().data_ptr() for value in (*base.parameters(), *base.buffers())} | set(others)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held alive, so that no address is counted for two tensors.
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = velocity(base, clips, frames, prompt)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("shape", "kind"), [("small-music-base", "bora"), ("medium-base", "dora-rows"), ("small-music-base", "lora")]
)
def test_kept_bytes_bound_what_autograd_saves_within_a_tenth(monkeypatch, shape, kind):
    # What is saved does not depend on values, and millions of random numbers take seconds.
    monkeypatch.setattr(random_weights, "uniform", lambda key, shape, *_: torch.full(shape, 0.01))
    base = random_weights.random_base(shape, depth=1)
    attach_adapter(base, adapter_type=kind, rank=16)
    counted = flops.count(base.config, batch_of(2, 60, 40), memory.adapter_of(base), 4, 4)
    measured = kept_bytes(base, 2, 60, 40)
    assert measured <= 1.02 * counted.kept_bytes()
    assert counted.kept_bytes() <= 1.1 * measured


@pytest.mark.parametrize("kind", ["dora-rows", "bora", "dora-cols", "lora-xs"])
@pytest.mark.parametrize("base", ["medium"], indirect=True)
def test_formed_weights_keep_as_much_less_as_is_counted(base, kind):
    attach_adapter(base, adapter_type=kind, rank=2)
    counted, measured, own = {}, {}, set()
    for formed in (False, True):
        if formed:
            settings = StepSettings(adapter_products="formed")
            flat = FlatAdapters(adapter_parameters(base), 1e-3, 0.01, scalars=0)
            held = keep_formed(base, flat, settings, torch.device("cpu"))
            held.form()
            own = {value.untyped_storage().data_ptr() for value in (flat.values, held.layers[0].weight_OI)}
        adapter = memory.adapter_of(base)
        assert adapter.formed is formed
        counted[formed] = flops.count(base.config, batch_of(2, 100, 40), adapter, 4, 4).kept_bytes()
        measured[formed] = kept_bytes(base, 2, 100, 40, own)
    assert measured[True] < (0.9 if kind in ("dora-rows", "bora") else 1.0) * measured[False]
    assert counted[False] - counted[True] == pytest.approx(measured[False] - measured[True], rel=0.05)


def test_recomputing_saves_all_but_the_norms_shared_over_the_step(base):
    attach_adapter(base, adapter_type="dora-cols", rank=2)
    counted = flops.count(base.config, batch_of(2, 100, 40), memory.adapter_of(base), 4, 4)
    first, second = counted.blocks
    norms = sum(
        4 * (layer.weight.shape[1] * (2 + 2)) for name, layer in adapted_layers(base).items() if "layers.0." in name
    )
    assert first.norm_bytes == norms > 0
    assert counted.kept_bytes(2) - counted.ends.kept_bytes == (
        first.input_bytes + second.input_bytes + second.norm_bytes + first.kept_bytes
    )


def medium_count(frames=4091, clips=1):
    config = parse_model_config(released_config("medium-base"), "medium")
    return config, flops.count(config, memory.batch_of(config, frames, clips), FROZEN, 2, 2, inputs_learn=True)


def test_the_fewest_blocks_are_recomputed_that_make_the_step_fit():
    config, counted = medium_count()
    kept = [counted.kept_bytes(blocks) for blocks in range(config.dit.depth + 1)]
    assert kept[1:] == sorted(kept[1:], reverse=True)
    for free, expected in ((1e12, 0), (1e9, config.dit.depth), ((kept[7] + 1e9) / memory.USABLE_SHARE, 7)):
        choice = memory.fewest_recomputed(counted, 1e9, free)
        assert choice.recomputed_blocks == expected
        assert choice.fits is (free != 1e9)
    assert not memory.Choice(6, 1e9 + kept[6], (kept[7] + 1e9) / memory.USABLE_SHARE).fits


@pytest.mark.parametrize(("choice", "expected"), [("on", 2), ("off", 0), ("auto", 0)])
def test_the_setting_decides_and_auto_says_what_it_picked(base, caplog, monkeypatch, choice, expected):
    attach_adapter(base, rank=2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 32)
    with caplog.at_level("INFO", logger="sa3dist"):
        assert memory.recomputed_blocks(choice, base, FRAMES, CLIPS, torch.device("cpu"), "no") == expected
    assert ("0 of 2 blocks recomputed" in caplog.text) is (choice == "auto")


def test_auto_recomputes_everything_where_nothing_fits_and_says_so(base, caplog, monkeypatch):
    attach_adapter(base, rank=2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 20)
    with caplog.at_level("INFO", logger="sa3dist"):
        assert memory.recomputed_blocks("auto", base, FRAMES, CLIPS, torch.device("cpu"), "no") == 2
    assert "may run out of memory" in caplog.text


def test_recomputing_any_number_of_blocks_changes_no_bit_of_any_gradient(base):
    attach_adapter(base, adapter_type="dora-rows", rank=3)
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    found = {}
    for blocks in (0, 1, 2):
        base.recomputed_blocks = blocks
        torch.manual_seed(3)
        found[blocks] = torch.autograd.grad(velocity(base, CLIPS, FRAMES, PROMPT).square().sum(), trained)
    for blocks in (1, 2):
        assert all(map(torch.equal, found[blocks], found[0]))


def test_free_memory_and_peak_are_plausible():
    assert 0 < devices.free_bytes(torch.device("cpu")) < 1 << 50
    assert memory.memory_figures(torch.device("cpu"))["peak_bytes"] > 50 << 20
