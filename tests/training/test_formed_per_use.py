"""Weights formed for every use of a block: the bits of those kept for a step, in the memory of one block."""

import pytest
import torch

from sa3dist import config
from sa3dist.adapters import adapted_layers, detach_adapter, formed, formed_once
from sa3dist.errors import ConfigError
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import memory
from sa3dist.training.acceleration import choose_acceleration
from tests.helpers.packed_clips import inputs
from tests.helpers.recorded_step import shifted
from tests.helpers.trainers import make_settings, make_trainer

ALONE = Group(0, 1, torch.device("cpu"))
KEPT = {"adapter_products": "formed", "gradient_checkpointing": "on"}
PER_USE = {"adapter_products": "per_use"}


def trainer_of(kind="dora-rows", include=None, **changes):
    """A trainer that chose how it computes, its adapters off their initial values; and its micro batch."""
    settings = make_settings(**changes)
    trainer, batch = make_trainer(ALONE, 2, settings, accumulation=2, kind=kind, include=include)
    values = trainer.engine.flat.values.data
    values += 0.05 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    choose_acceleration(trainer, settings, batch.noised_BDT.shape[2])
    return trainer, batch


def course(kind, **changes):
    """Of two steps the losses and gradients, the adapters after them, and what every block then gives."""
    trainer, batch = trainer_of(kind, **changes)
    found = []
    for step in range(2):
        figures = trainer.take_step(iter([shifted(batch, step), shifted(batch, step + 9)]), StopRequest())
        found += [torch.tensor([figures["loss"], figures["grad_norm"]]), trainer.engine.gradient.clone()]
    with torch.no_grad():
        trainer.engine.formed.form()
        found += [trainer.engine.flat.values.clone(), trainer.base.velocity(**inputs(trainer.base))]
        with formed_once(trainer.base):
            found.append(trainer.base.velocity(**inputs(trainer.base)))
    return trainer, found


@pytest.mark.parametrize(
    ("kind", "precision"), [("dora-rows", "bf16"), ("dora-cols", "no"), ("bora-xs", "no"), ("lora", "no")]
)
def test_formed_per_use_a_run_and_what_is_evaluated_after_it_have_the_bits_of_fixed_weights(kind, precision):
    kept, expected = course(kind, mixed_precision=precision, **KEPT)
    per_use, found = course(kind, mixed_precision=precision, **PER_USE)
    assert (kept.engine.formed.per_use, per_use.engine.formed.per_use) == (False, True)
    assert kept.base.gradient_checkpointing
    assert per_use.base.gradient_checkpointing
    assert expected[1].abs().max() > 0
    assert not torch.equal(expected[0], expected[2])
    for number, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(value, wanted), number


def test_the_blocks_share_the_memory_of_the_largest():
    # Of the second block two layers, of the first one; and one outside of them.
    include = ["layers.0.self_attn.to_out", "layers.1.self_attn.to_out", "layers.1.ff.ff.2", "to_cond_embed.0"]
    trainer, _ = trainer_of(include=include, **PER_USE)
    sizes, places = {0: 0, 1: 0, None: 0}, {0: set(), 1: set(), None: set()}
    for name, layer in adapted_layers(trainer.base).items():
        block = int(name.partition("layers.")[2].partition(".")[0]) if "layers." in name else None
        for value in vars(layer.formed).values():
            sizes[block] += -(-value.numel() // 16) * 16
            places[block].add((value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()))
    assert sizes[1] > sizes[0] > 0
    assert places[0] == places[1]
    ((shared, shared_bytes),), ((outside, outside_bytes),) = places[0], places[None]
    assert shared != outside
    assert (shared_bytes, outside_bytes) == (4 * sizes[1], 4 * sizes[None])


MUCH, LITTLE = 1 << 40, 1 << 10


@pytest.fixture
def free(monkeypatch):
    """What is free on a device whose kernels serve, each time it is asked."""
    monkeypatch.setattr(formed, "obstacle_to", lambda *_: None)
    monkeypatch.setattr(formed, "trial", lambda *_: None)
    left = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: left.pop(0))
    return left


@pytest.mark.parametrize(
    ("found", "changes", "expected"),
    [
        ([MUCH], {}, (False, 0)),
        ([MUCH], {"gradient_checkpointing": "on"}, (False, 2)),
        ([LITTLE, MUCH], {}, (True, 2)),
        ([LITTLE, LITTLE], {"gradient_checkpointing": "on"}, (True, 2)),
        ([], {"gradient_checkpointing": "off"}, (False, 0)),
        ([LITTLE], {"adapter_products": "formed"}, (False, 2)),
        ([], PER_USE, (True, 2)),
    ],
)
def test_weights_are_kept_while_the_step_fits_with_every_block_recomputed(free, caplog, found, changes, expected):
    free[:] = found
    with caplog.at_level("INFO", "sa3dist.training.memory"):
        trainer, _ = trainer_of(**changes)
    assert (trainer.engine.formed.per_use, trainer.base.recomputed_blocks) == expected
    assert free == []
    said = " ".join(record.getMessage() for record in caplog.records if record.name == "sa3dist.training.memory")
    assert ("formed for every use" in said) is (len(found) == 2)
    assert ("may run out" in said) is (found[-1:] == [LITTLE])


def test_weights_that_cannot_even_be_allocated_are_formed_per_use_unless_a_setting_forbids_it(free, monkeypatch):
    whole = formed.FormedWeights

    def little_memory(specs, products, memory=None):
        if memory is None and len(specs) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(specs, products, memory=memory)

    monkeypatch.setattr(formed, "FormedWeights", little_memory)
    for changes in (KEPT, {"gradient_checkpointing": "off"}):
        with pytest.raises(torch.OutOfMemoryError):
            trainer_of(include=["layers."], **changes)
    trainer, _ = trainer_of(include=["layers."])
    assert trainer.engine.formed.per_use
    detach_adapter(trainer.base)
    assert trainer.base.dit.transformer.form_block is None


def test_per_use_needs_recomputed_blocks():
    with pytest.raises(ConfigError, match="per_use forms weights anew as .* use gradient_checkpointing: auto"):
        make_settings(**PER_USE, gradient_checkpointing="off")
    assert config.build({"audio_data_url": "x", **PER_USE}).gradient_checkpointing == "auto"
