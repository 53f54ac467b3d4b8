"""The count of a step's work and kept values: against torch's own counter, autograd's saved tensors, and a GPU."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from sa3dist.adapters import adapted_layers, adapter_parameters, attach_adapter, candidate_layers
from sa3dist.adapters.formed import use_formed_weights
from sa3dist.adapters.layers import cached_norms
from sa3dist.commands.plan_predict import Job, plan_memory
from sa3dist.config import build
from sa3dist.cost_model.devices import GPUS, free_bytes
from sa3dist.cost_model.fake_network import AdapterShape, BatchShape, FakeNetwork, Numerics
from sa3dist.model import random_weights
from sa3dist.model.base import Base
from sa3dist.model.conditioners import HIDDEN_WIDTH
from sa3dist.model.loading import meta_roots
from sa3dist.model.packing import FilledPacking, Packing
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.released import released_config
from sa3dist.model.tiny import tiny_config
from sa3dist.parallel.flat_adamw import FlatAdapters
from sa3dist.training import memory
from tests.helpers.recorded_step import StepSettings

CLIPS, FRAMES = 2, 21
RESULTS = Path(__file__).parents[2] / "kernels/benchmarks/results"
# torch's counter knows the fused attention of GPUs only, and overlooks oneDNN's product and the one that adds in place.
ALSO_COUNTED = {
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: mm_flop(x, weight[::-1]),
    torch.ops.aten.addmm_: lambda _, a, b, *__, **___: mm_flop(a, b),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def make_base(model: str, depth: int, precision=torch.float32) -> Base:
    config = parse_model_config(tiny_config(model, depth=depth), model)
    return Base(config, random_weights.RandomWeights(config, 1), "cpu", precision, text_source=None, encoder=False)


@pytest.fixture(params=["medium", "small"])
def base(request):
    return make_base(request.param, depth=3)


def velocity(base, clips=CLIPS, frames=FRAMES, given=False):
    x, number = torch.randn(clips, base.latent_channels, frames), torch.full((clips,), 0.5)
    mask = torch.ones(clips, base.prompt_tokens)
    embeds = base.embed_prompts(torch.randn(clips, base.prompt_tokens, HIDDEN_WIDTH), mask)
    context = {"inpaint_mask_B1T": torch.ones(clips, 1, frames), "inpaint_latents_BDT": x} if given else {}
    packing = Packing.of(torch.ones(clips, frames, dtype=torch.bool))
    return base.velocity(x, number, embeds, mask, number, packing=packing, **context)


def counted_for(base, clips=CLIPS, frames=FRAMES, autocast="no", given=False, backward=True):
    adapter = adapter_of(base)
    network = FakeNetwork(base.config, adapter, Numerics(base.dtype, autocast == "bf16"))
    return network.count(BatchShape(clips, frames, given), backward)


def adapter_of(base) -> AdapterShape:
    layers = adapted_layers(base)
    kind, formed = next((layer.kind, layer.formed is not None) for layer in layers.values())
    return AdapterShape(kind, base.adapter_config.rank, frozenset(layers), formed)


def measured_flops(base, given=False):
    with FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED) as counter:
        velocity(base, given=given).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("base", "recomputed"), [("medium", 0), ("medium", 1), ("small", 3)], indirect=["base"])
def test_the_fake_networks_operations_equal_torchs_own_count_of_the_real_one(base, recomputed):
    attach_adapter(base, adapter_type="dora-rows", rank=2)
    base.recomputed_blocks = recomputed
    with cached_norms(adapted_layers(base).values()):
        measured = measured_flops(base)
    # Norms that are shared over a step are found once more by the count where blocks are recomputed.
    assert counted_for(base).total(recomputed).flops == pytest.approx(measured, rel=1e-9 if recomputed == 0 else 0.01)


@pytest.mark.parametrize(
    ("base", "include"),
    [
        ("medium", None),
        ("small", None),
        ("medium", ["layers.0.ff", "layers.1.to_local"]),
        ("small", ["to_cond_embed"]),
        ("medium", ["layers.1.to_local"]),
        ("small", ["project_out", "layers.2."]),
    ],
    indirect=["base"],
)
def test_operations_start_at_the_first_adapted_layer_whichever_that_is(base, include):
    attach_adapter(base, adapter_type="lora", rank=5, include=include)
    assert counted_for(base).total().flops == measured_flops(base)


@pytest.mark.parametrize("kind", sorted(ADAPTER_TYPES))
def test_every_types_operations_and_kept_bytes_are_those_of_the_real_network(kind):
    # Two blocks that are adapted alike: one is counted for both.
    base = make_base("medium", depth=2)
    attach_adapter(base, adapter_type=kind, rank=2)
    counted = counted_for(base, given=True)
    assert counted.total().flops == measured_flops(base, given=True)
    assert counted.saved_bytes() == pytest.approx(saved_bytes(base, given=True), rel=0.01)


def saved_bytes(base, clips=CLIPS, frames=FRAMES, given=False, others=(), autocast="no") -> int:
    """Bytes of distinct storages autograd saves, parameters, buffers and ``others`` by their address aside."""
    kept: dict[int, torch.UntypedStorage] = {}
    own = {value.untyped_storage().data_ptr() for value in (*base.parameters(), *base.buffers())} | set(others)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held alive, so that no address is counted for two tensors.
            kept[storage.data_ptr()] = storage
        return tensor

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saving, torch.autocast("cpu", torch.bfloat16, enabled=autocast == "bf16"):
        output = velocity(base, clips, frames, given)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("shape", "kind", "precision"),
    [
        ("medium-base", "dora-rows", torch.float32),
        ("small-music-base", "lora", torch.bfloat16),
    ],
)
def test_kept_bytes_of_released_shapes_are_what_autograd_saves(monkeypatch, shape, kind, precision):
    # What is saved does not depend on values, and millions of random numbers take seconds.
    monkeypatch.setattr(random_weights, "uniform", lambda key, shape, *_: torch.full(shape, 0.01))
    base = random_weights.random_base(shape, depth=1, dtype=precision)
    attach_adapter(base, adapter_type=kind, rank=16)
    autocast = "bf16" if precision == torch.bfloat16 else "no"
    measured = saved_bytes(base, 2, 60, autocast=autocast)
    assert counted_for(base, 2, 60, autocast, backward=False).saved_bytes() == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("kind", ["dora-rows", "bora", "dora-cols", "lora-xs"])
def test_formed_weights_keep_what_is_counted(kind):
    base = make_base("medium", depth=3)
    attach_adapter(base, adapter_type=kind, rank=2)
    factored = saved_bytes(base, 1, 100)
    settings = StepSettings(adapter_products="formed")
    flat = FlatAdapters(adapter_parameters(base), 1e-3, 0.01, scalars=0)
    held = use_formed_weights(base, flat, settings, torch.device("cpu"))
    held.form()
    own = {value.untyped_storage().data_ptr() for value in (flat.values, held.parts[None].layers[0].weight_OI)}
    memory_tokens = base.config.dit.num_memory_tokens
    packing = FilledPacking.of((100,), memory_tokens, 100, memory_tokens + 100)
    measured = saved_bytes(FilledBase(base, packing), 1, 100, others=own)
    assert measured < (0.9 if kind in ("dora-rows", "bora") else 1.0) * factored
    assert counted_for(base, 1, 100, backward=False).saved_bytes() == pytest.approx(measured, rel=0.01)


class FilledBase:
    """A base whose micro batches are packed as where weights are formed."""

    def __init__(self, base, packing):
        self.base, self.packing = base, packing

    def __getattr__(self, name):
        return getattr(self.base, name)

    def velocity(self, *given, packing, **named):
        return self.base.velocity(*given, packing=self.packing, **named)


def test_recomputing_keeps_a_blocks_input_and_the_values_of_one():
    base = make_base("medium", depth=3)
    attach_adapter(base, rank=2)
    counted = counted_for(base, backward=False)
    tokens = CLIPS * (FRAMES + base.config.dit.num_memory_tokens)
    assert counted.input_bytes == 4 * tokens * base.config.dit.embed_dim
    one = counted.blocks[0].saved_bytes
    assert counted.saved_bytes(3) - counted.ends.saved_bytes == 3 * counted.input_bytes + one
    assert counted.saved_bytes(1) - counted.ends.saved_bytes == counted.input_bytes + 3 * one


# What was set where a peak was measured.
FIGURES = {
    "total_bytes": {"gradient_checkpointing": "off"},
    "recomputing_total_bytes": {"gradient_checkpointing": "on"},
    "per_use_total_bytes": {"adapter_products": "per_use"},
}


@functools.cache
def planned(frames: int, adapter_type: str, **changes: str):
    """The measured runs of gpu_step.json, as planned: micro batches without given context, as was measured."""
    job = medium_job().changed(adapter_type=adapter_type, duration=frames * 4096 / 44100, **changes)
    job = dataclasses.replace(job, frames=frames)
    return plan_memory(job, GPUS["H100"], given_context=False)


# Jobs that are changed from one share the networks that were counted.
@functools.cache
def medium_job() -> Job:
    settings = build({"audio_data_url": "x", "model": "medium-base", "batch_size": 1})
    return Job.of(settings, parse_model_config(released_config("medium-base"), "m"))


MEASURED = json.loads((RESULTS / "gpu_step.json").read_text())
# Bytes a token and block: until then what norms gave was kept, 3 and 2 widths, and queries and keys, 4.
AGAIN = 9 * 1536 * 2 if MEASURED["environment"]["date"] < "2026-11-27T23" else 0


@pytest.mark.parametrize("row", MEASURED["rows"], ids=lambda row: f"{row['adapter_type']}-{row['frames']}")
def test_predicted_peaks_are_within_a_tenth_of_those_measured_on_a_gpu(row):
    assert (row["shape"], row["rank"], row["batch"]) == ("medium-base", 16, 1)
    for figure, changes in FIGURES.items():
        if row.get(figure) is not None:
            found = planned(row["frames"], row["adapter_type"], **changes)
            again = AGAIN * (row["frames"] + 64) * (24 if figure == "total_bytes" else 1)
            # The allocator does not count the context.
            assert found.peak_bytes - found.bytes["context"] == pytest.approx(row[figure] - again, rel=0.06)


def test_a_compiled_block_keeps_what_products_and_attention_give_and_the_stream():
    config = parse_model_config(released_config("medium-base", depth=1), "medium")
    layers = frozenset(candidate_layers(meta_roots(config)))
    adapter = AdapterShape(ADAPTER_TYPES["dora-rows"], 16, layers, formed=True)
    network = FakeNetwork(config, adapter, Numerics(torch.bfloat16, True, True))
    (block,) = network.count(BatchShape(1, 4091), backward=False).blocks
    tokens = 4091 + config.dit.num_memory_tokens
    # In widths per token: what layers give, 5 and 1, outputs of both members and their difference; likewise in
    # cross-attention, 2 and 1; in the feed-forward 8 and 1; the stream ahead of each. The rest is made again: 27.4 is
    # what the compiler keeps (``plan_block.py``), 0.4 of it of the prompt.
    widths = (5 + 1 + 2 + 1) + (2 + 1 + 2 + 1) + (8 + 1) + 3
    assert block.saved_bytes == pytest.approx(2 * tokens * config.dit.embed_dim * widths, rel=0.03)


def medium_count(frames=4091, clips=1):
    config = parse_model_config(released_config("medium-base"), "medium")
    adapter = AdapterShape(ADAPTER_TYPES["lora"], 16, frozenset(candidate_layers(meta_roots(config))))
    return config, FakeNetwork(config, adapter, Numerics(torch.bfloat16)).count(BatchShape(clips, frames), False)


def test_the_fewest_blocks_are_recomputed_that_make_the_step_fit():
    config, counted = medium_count()
    kept = [counted.saved_bytes(blocks) for blocks in range(config.dit.depth + 1)]
    assert kept[1:] == sorted(kept[1:], reverse=True)
    for free, expected in ((1e12, 0), (1e9, config.dit.depth), ((kept[7] + 1e9) / memory.USABLE_SHARE, 7)):
        choice = memory.fewest_recomputed(counted, 1e9, free)
        assert choice.recomputed_blocks == expected
        assert choice.fits is (free != 1e9)
    assert not memory.Choice(6, 1e9 + kept[6], (kept[7] + 1e9) / memory.USABLE_SHARE).fits


def picked(setting, base):
    return memory.recomputed_blocks(setting, memory.LargestPass(base, FRAMES, CLIPS, "no"), torch.device("cpu"))


@pytest.mark.parametrize(("choice", "expected"), [("on", 3), ("off", 0), ("auto", 0)])
def test_the_setting_decides_and_auto_says_what_it_picked(base, caplog, monkeypatch, choice, expected):
    attach_adapter(base, rank=2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 32)
    with caplog.at_level("INFO", logger="sa3dist"):
        assert picked(choice, base) == expected
    assert ("0 of 3 blocks recomputed" in caplog.text) is (choice == "auto")


def test_auto_recomputes_everything_where_nothing_fits_and_says_so(base, caplog, monkeypatch):
    attach_adapter(base, rank=2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 20)
    with caplog.at_level("INFO", logger="sa3dist"):
        assert picked("auto", base) == 3
    assert "may run out of memory" in caplog.text


def test_recomputing_any_number_of_blocks_changes_no_bit_of_any_gradient(base):
    attach_adapter(base, adapter_type="dora-rows", rank=3)
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    found = {}
    for blocks in (0, 1, 3):
        base.recomputed_blocks = blocks
        torch.manual_seed(3)
        found[blocks] = torch.autograd.grad(velocity(base).square().sum(), trained)
    for blocks in (1, 3):
        assert all(map(torch.equal, found[blocks], found[0]))


def test_free_memory_and_peak_are_plausible():
    assert 0 < free_bytes(torch.device("cpu")) < 1 << 50
    assert memory.memory_figures(torch.device("cpu"))["peak_bytes"] > 50 << 20
