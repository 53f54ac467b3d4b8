"""Steps are launched before the host knows whether they count: what it then finds is what the device has done."""

import dataclasses
import itertools
import math

import pytest
import torch

from sa3dist import errors
from sa3dist.parallel.flat_adamw import MOMENTS
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import trainer as trainer_module
from sa3dist.training.step_sums import SUMS, must_skip
from tests.helpers.ranks import run_ranks
from tests.helpers.recorded_step import shifted
from tests.helpers.trainers import make_settings, make_trainer

ALONE = Group(0, 1, torch.device("cpu"))
ACCUMULATION = 2


def trainer_of(group, steps=9):
    """A trainer whose weights are formed, and a micro batch whose gradients are large."""
    settings = make_settings(adapter_products="formed")
    trainer, batch = make_trainer(group, steps, settings, accumulation=ACCUMULATION, kind="bora")
    return trainer, dataclasses.replace(batch, target_BDT=1e3 * batch.target_BDT)


def micro_batches(batch, step, group):
    return [shifted(batch, 100 * step + 10 * group.dist_rank + number) for number in range(ACCUMULATION)]


def held(trainer):
    """Copies of values, moments and the count of steps."""
    flat = trainer.engine.flat
    state = flat.optimizer.state
    return [value.detach().clone() for value in (flat.values, state["step"], *(state[name] for name in MOMENTS))]


def equal(found, expected):
    return all(torch.equal(value, wanted) for value, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize("failed", [0.0, 1.0, 3.0])
def test_the_device_decides_as_the_host_does(failed):
    for loss, norm in itertools.product((0.0, 3e38, math.inf, -math.inf, math.nan), repeat=2):
        scalars = torch.full((len(SUMS),), math.nan)
        scalars[SUMS.index("failed")], scalars[SUMS.index("loss")] = failed, loss
        taken = failed == 0 and math.isfinite(loss) and math.isfinite(norm)
        assert must_skip(scalars, torch.tensor(norm)).item() == (not taken), (loss, norm)


def skipped_course(group):
    """Two steps with three between them that do not count; what is held after each, and what the ranks were told."""
    trainer, batch = trainer_of(group)
    assert trainer.engine.steps_ahead
    norm = trainer.take_step(iter(micro_batches(batch, 1, group)), StopRequest())["grad_norm"]
    states, told = [held(trainer)], []

    def gone(good):
        yield from good
        raise errors.DataError("clips.zip: gone")

    first, last = micro_batches(batch, 2, group)
    of_second = group.dist_rank == 1
    bad = dataclasses.replace(last, target_BDT=last.target_BDT * (math.nan if of_second else 1))
    large = dataclasses.replace(last, target_BDT=last.target_BDT * 1e30)
    for batches in (iter([first, bad]), gone([first]) if of_second else iter([first, last]), iter([large, last])):
        with pytest.raises(errors.EnvironmentFailure) as failure:
            trainer.take_step(batches, StopRequest())
        states.append(held(trainer))
        told.append(str(failure.value))
    trainer.take_step(iter([first, last]), StopRequest())
    return norm, states, held(trainer), told


def undisturbed_course(group):
    trainer, batch = trainer_of(group)
    for step in (1, 2):
        trainer.take_step(iter(micro_batches(batch, step, group)), StopRequest())
    return held(trainer)


def test_a_step_that_does_not_count_changes_no_bit_on_any_rank():
    ranks = run_ranks(2, lambda group: (skipped_course(group), undisturbed_course(group)))
    for (norm, states, end, told), undisturbed in ranks:
        assert norm > 100
        assert all(equal(state, states[0]) for state in states)
        assert not equal(end, states[0])
        assert equal(end, undisturbed)
        assert told == ranks[0][0][3]
    not_a_number, gone, overflown = told
    assert "step 2: the loss of clip a, b is not finite" in not_a_number
    assert "clips.zip: gone" in gone
    assert "step 2: the loss of clip a, b is not finite" in overflown


def test_adamw_and_the_next_weights_are_launched_before_the_host_waits(monkeypatch):
    trainer, batch = trainer_of(ALONE, steps=2)
    noted = []

    def noting(name, function):
        def call(*arguments):
            noted.append(name)
            return function(*arguments)

        return call

    start_copy_to_host = trainer_module.start_copy_to_host
    monkeypatch.setattr(trainer_module, "start_copy_to_host", lambda values: noting("wait", start_copy_to_host(values)))
    monkeypatch.setattr(trainer.engine.formed, "form", noting("form", trainer.engine.formed.form))
    monkeypatch.setattr(trainer.engine, "average", noting("average", trainer.engine.average))
    monkeypatch.setattr(trainer.engine, "step", noting("step", trainer.engine.step))
    for step in (1, 2):
        trainer.take_step(iter(micro_batches(batch, step, ALONE)), StopRequest())
    # Nothing is formed behind the last one.
    assert noted == ["form", "average", "step", "form", "wait", "average", "step", "wait"]


def course(trainer, batch):
    """Two steps, the first once more from the state before it, and what the passes then multiply with."""
    zeros = {name: torch.zeros_like(value) for name, value in trainer.engine.adapters().items()}
    begin, found = trainer.engine.adapters(), []
    trainer.engine.restore(begin, dict.fromkeys(MOMENTS, zeros), 0)
    for step in (1, 2, 1):
        if len(found) == 2:
            trainer.engine.restore(begin, dict.fromkeys(MOMENTS, zeros), 0)
        figures = trainer.take_step(iter(micro_batches(batch, step, ALONE)), StopRequest())
        found.append((figures["loss"], figures["grad_norm"], *held(trainer)))
    return found


def test_weights_formed_ahead_are_those_of_the_step_and_of_what_was_restored_since():
    ahead, behind = (trainer_of(ALONE) for _ in range(2))
    behind[0].engine.steps_ahead = False
    found, expected = course(*ahead), course(*behind)
    for number, (values, wanted) in enumerate(zip(found, expected, strict=True)):
        assert values[:2] == wanted[:2], number
        assert equal(values[2:], wanted[2:]), number
    assert found[0][:2] == found[2][:2] != found[1][:2]
    assert equal(found[0][2:], found[2][2:])
