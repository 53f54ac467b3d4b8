"""Under ZeRO-3 weights are formed block by block: what DDP trains, with one block of the base on a rank at a time."""

import dataclasses
import logging
import os

import pytest
import torch

import sa3dist
from sa3dist.adapters import adapted_layers, attach_adapter
from sa3dist.model.compiled import compile_blocks, uncompiled
from sa3dist.parallel.flat_adamw import MOMENTS
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.shape_ladder import ShapeLadder
from tests.helpers.golden import golden
from tests.helpers.ranks import run_ranks
from tests.helpers.recorded_step import both_shapes, shifted
from tests.helpers.trainers import make_settings, make_trainer
from tests.helpers.zero_ranks import import_deepspeed

STEPS, ACCUMULATION = 2, 3
# Nothing is kept whole, nor kept or gathered ahead for its next use; what is divided lies on the CPU.
DIVIDED = {
    "stage": 3,
    "reduce_bucket_size": 100_000,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "offload_param": {"device": "cpu"},
    "offload_optimizer": {"device": "cpu"},
}


def trainer_of(group, divided, products):
    """A trainer on the tiny base, all of its layers adapted, and adapters off their initial values."""
    if divided:
        import deepspeed

        os.environ["LOCAL_RANK"] = str(group.dist_rank)
        deepspeed.comm.init_distributed("gloo", dist_init_required=False)
        group = dataclasses.replace(group, deepspeed={"zero_optimization": DIVIDED})
    settings = make_settings(adapter_products=products)
    trainer, _ = make_trainer(group, STEPS, settings, accumulation=ACCUMULATION, kind="bora")
    draw, adapters = torch.Generator().manual_seed(1), sorted(trainer.engine.adapters().items())
    return trainer, {name: value + 0.05 * torch.randn(value.shape, generator=draw) for name, value in adapters}


def course(trainer, adapters, steps=STEPS):
    """Losses and norms, each step's means of gradients, the adapters, the loss of an evaluation after it."""
    engine, (whole, shorter) = trainer.engine, both_shapes()
    zeros = {name: torch.zeros_like(value) for name, value in adapters.items()}
    engine.restore(adapters, dict.fromkeys(MOMENTS, zeros), 0)
    rank, found, means = trainer.group.dist_rank, [], []
    # The ranks' clips differ, in length too.
    turns = [shorter, whole] if rank else [whole, shorter]
    for step in range(steps):
        numbers = range(ACCUMULATION)
        batches = (shifted(turns[number % 2], 100 * step + 10 * number + rank) for number in numbers)
        figures = trainer.take_step(batches, StopRequest())
        found.append((figures["loss"], figures["grad_norm"]))
        means.append(engine.moments()["exp_avg"])
    if engine.formed is not None:
        engine.formed.form()
    with torch.no_grad(), uncompiled(trainer.base.dit):
        evaluated = engine.losses(shorter)["loss"].item()
    return found, means, engine.adapters(), evaluated


def of_divided(group):
    """A course under ZeRO-3, what was on the rank meanwhile, and what compiled blocks make of it."""
    trainer, adapters = trainer_of(group, True, "per_use")
    transformer, live = trainer.base.dit.transformer, []
    frozen = [value for value in trainer.base.dit.parameters() if not value.requires_grad]
    form = transformer.form_block

    def form_block(number):
        live.append((number, sum(value.numel() for value in frozen)))
        form(number)

    transformer.form_block = form_block
    found = course(trainer, adapters)
    transformer.form_block = form
    left = sum(value.numel() for value in frozen)
    in_block = [[value for child in block.children() for value in child.parameters()] for block in transformer.layers]
    sizes = [sum(value.ds_numel for value in block if not value.requires_grad) for block in in_block]
    formed = [layer.formed.weight_OI for layer in trainer.layers if layer.formed is not None]
    memory = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in formed}
    everything = sum(value.ds_numel for value in frozen)
    return found, (live, left, sizes, everything, memory), of_compiled(trainer, adapters)


def of_compiled(trainer, adapters):
    """Adapters after a step without and with blocks that one rank compiles, and how many programs it made of them."""
    trainer.ladder = ShapeLadder(both_shapes()[0].noised_BDT.shape[2], trainer.base.dit.transformer.memory)
    plain = course(trainer, adapters, steps=1)[2]
    torch._dynamo.utils.counters.clear()
    compile_blocks(trainer.base.dit, "eager" if trainer.group.is_main else None)
    return plain, course(trainer, adapters, steps=1)[2], torch._dynamo.utils.counters["stats"]["unique_graphs"]


def of_choices(group):
    """On ranks whose kernels serve, by what is in the way: how many blocks are formed with ``auto``, what is said."""
    found, said = {}, []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    # Imported where DeepSpeed is known to be there.
    from sa3dist.parallel import zero_blocks

    zero_blocks.log.addHandler(handler)
    zero_blocks.log.setLevel("INFO")
    on_one = "a reason of rank 1" if group.dist_rank == 1 else None
    for case, obstacle, failure, changes in [
        ("nothing", None, None, {}),
        ("kernels", on_one, None, {}),
        ("trial", None, on_one, {}),
        ("checkpointing", None, None, {"gradient_checkpointing": "off"}),
    ]:
        zero_blocks.obstacle_to = lambda *_, found=obstacle: found
        zero_blocks.trial = lambda _, found=failure: found
        base = sa3dist.load_base(golden("tiny-sa3"))
        attach_adapter(base, "dora-rows", rank=2)
        layers = list(adapted_layers(base).values())
        said.clear()
        formed, blocks = zero_blocks.form_by_block(base, layers, make_settings(**changes), group)
        kept = [layer for layer in layers if layer.formed is not None]
        found[case] = formed is not None, len(blocks), len(kept), " ".join(said)
    return found


@pytest.fixture(scope="module")
def found():
    import_deepspeed()
    # Once for all forked ranks.
    torch.compile(torch.neg, backend="eager")(torch.ones(1))

    def work(group):
        expected = course(*trainer_of(group, False, "formed"))
        return expected, *of_divided(group), of_choices(group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return run_ranks(2, work)


def test_clips_of_other_lengths_on_every_rank_train_what_they_train_under_ddp(found):
    for (rows, (gradients, _), adapters, evaluated), (others, (same, _), *after), *_ in found:
        assert others[0] == pytest.approx(rows[0], rel=1e-6)
        assert others[1] == pytest.approx(rows[1], rel=1e-5)
        assert after[1] == pytest.approx(evaluated, rel=1e-5)
        whole = torch.cat([value.flatten() for value in gradients.values()])
        apart = torch.cat([(same[name] - value).flatten() for name, value in gradients.items()])
        assert apart.norm() < 1e-6 * whole.norm()
        for name, value in gradients.items():
            assert value.norm() > 0, name
            assert (same[name] - value).norm() < 5e-6 * value.norm(), name
            assert (after[0][name] - adapters[name]).norm() < 1e-5 * adapters[name].norm(), name


def test_a_rank_holds_one_block_at_a_time_and_the_formed_weights_of_one(found):
    for _, _, (live, left, sizes, everything, memory), *_ in found:
        # Forward and, in the other order, backward of every micro batch; then an evaluation.
        assert [number for number, _ in live] == [0, 1, 1, 0] * (STEPS * ACCUMULATION) + [0, 1]
        assert max(sizes) <= max(values for _, values in live) < 1.1 * max(sizes)
        assert 1.1 * max(sizes) < sum(sizes) < everything
        assert left == 0
        # In float32, with two thin factors.
        (size,) = memory.values()
        assert 0.9 * max(sizes) < size / 4 < 1.3 * max(sizes)


def test_blocks_compiled_whole_are_two_programs_with_the_same_bits(found):
    # With gradients and without.
    assert [programs for *_, (_, _, programs), _ in found] == [2, 0]
    for *_, (plain, compiled, _), _ in found:
        assert all(torch.equal(compiled[name], value) for name, value in plain.items())


def test_the_ranks_form_weights_together_or_not_at_all_and_say_why(found):
    for *_, choices in found:
        formed, blocks, layers, said = choices.pop("nothing")
        assert (formed, blocks) == (True, 2)
        assert layers > 0
        assert "formed for every use of a block" in said
        for case, (*made, said) in choices.items():
            assert made == [False, 0, 0]
            assert ("gradient_checkpointing is off" if case == "checkpointing" else "a reason of rank 1") in said
