"""All parallel modes train one model whatever the size of its gradients: norms far above 1, and far below.

A clipping, an epsilon or a loss scale that one mode has and another has not shows in one of the two only.
"""

import dataclasses
import functools
import os

import pytest
import torch

import sa3dist
from sa3dist.adapters import adapter_parameters, attach_adapter
from sa3dist.data.batches.loader import micro_indices
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import checkpoint
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.trainer import Trainer
from tests.helpers.golden import golden
from tests.helpers.ranks import run_ranks
from tests.helpers.recorded_step import recorded_batch, shifted
from tests.helpers.trainers import make_settings
from tests.helpers.zero_ranks import import_deepspeed

CLIPS, MICRO_BATCH = 8, 2
BELOW, ABOVE = "norms below 0.01", "norms above 100"
# By what the base's last layer is multiplied. That layer does not learn: its gradient would not be small.
REGIMES = {ABOVE: 3.0, BELOW: 2.0**-10}
# A different clipping, epsilon or scale shows at once; a falling loss takes some steps.
STEPS, LEARNING_STEPS = 3, 12
INCLUDE = ["layers.1.", "project_in", "seconds_total"]
DDP = None
# Everything divided: nothing is small enough to be kept whole.
ZERO = {stage: {"stage": stage, "reduce_bucket_size": 100_000} for stage in (1, 2, 3)}
ZERO[3]["stage3_param_persistence_threshold"] = 0


@pytest.fixture(scope="module")
def deepspeed():
    import_deepspeed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


def course(group, regime, zero=DDP, first=1, last=None, kept=None, steps=STEPS, products="auto"):
    """Train steps first..last of the recorded base; (losses, norms, the state as a checkpoint holds it).

    zero   the file's ``zero_optimization``
    kept   where the state before ``first`` lies, and the one after ``last`` goes
    products   adapter_products
    """
    last = last or steps
    base = sa3dist.load_base(golden("tiny-sa3"))
    with torch.no_grad():
        base.dit.transformer.project_out.weight *= REGIMES[regime]
    attach_adapter(base, "bora", rank=3, include=INCLUDE, seed=1)
    if zero is not DDP:
        import deepspeed

        os.environ["LOCAL_RANK"] = str(group.dist_rank)
        deepspeed.comm.init_distributed("gloo", dist_init_required=False)
        group = dataclasses.replace(group, deepspeed={"zero_optimization": dict(zero)})
    accumulation = CLIPS // MICRO_BATCH // group.world_size
    plan = RunPlan(steps, accumulation, MICRO_BATCH, CLIPS, 42, {}, ["a", "b"])
    trainer = Trainer(base, adapter_parameters(base), make_settings(adapter_products=products), plan, group)
    if first > 1:
        trainer.restore(checkpoint.load(checkpoint.path_of(kept, first - 1)))
    clips = recorded_batch(base)
    numbers = micro_indices(range(first, last + 1), accumulation, group.dist_rank, group.world_size)
    batches = (shifted(clips, number) for number in numbers)
    figures = [trainer.take_step(batches, StopRequest()) for _ in range(first, last + 1)]
    if kept is not None:
        trainer.save(kept, StopRequest(), wait=True)
    adapters, moments = trainer.engine.adapters(), trainer.engine.moments()
    state = {"values": adapters, **moments}
    return [row["loss"] for row in figures], [row["grad_norm"] for row in figures], state


@pytest.fixture(scope="module", params=REGIMES)
def alone(request):
    """The regime, and its course in one process that accumulates all micro batches of a step."""
    # ZeRO's AdamW imports it; once for all forked ranks.
    import torch._dynamo  # noqa: F401

    (expected,) = run_ranks(1, lambda group: course(group, request.param))
    return request.param, expected


def assert_same_course(found, expected, within=1e-5):
    losses, norms, state = found
    assert losses == pytest.approx(expected[0], rel=within)
    assert norms == pytest.approx(expected[1], rel=within)
    for part, tensors in expected[2].items():
        assert state[part].keys() == tensors.keys()
        for name, value in tensors.items():
            assert (state[part][name] - value).double().norm() <= within * value.double().norm(), (part, name)


def test_the_regimes_are_what_they_are_called(alone):
    regime, (_, norms, _) = alone
    assert min(norms) > 100 if regime == ABOVE else 0 < max(norms) < 0.01


def test_a_run_with_large_gradients_learns():
    ((losses, *_),) = run_ranks(1, lambda group: course(group, ABOVE, steps=LEARNING_STEPS))
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def data_parallel(alone):
    return run_ranks(2, lambda group: course(group, alone[0]))[0]


def test_data_parallel_ranks_train_what_one_process_accumulates(alone, data_parallel):
    assert_same_course(data_parallel, alone[1])


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(
    "zero",
    [ZERO[1], ZERO[2], ZERO[2] | {"offload_optimizer": {"device": "cpu"}, "ignore_unused_parameters": False}],
    ids=["1", "2", "2, on the CPU"],
)
def test_zero_1_and_2_train_as_data_parallel_ranks_do(alone, data_parallel, zero):
    # Not to the bit: an AdamW kernel may round the last values of a rank's part otherwise.
    assert_same_course(run_ranks(2, lambda group: course(group, alone[0], zero))[0], data_parallel, within=1e-6)


@pytest.mark.usefixtures("deepspeed")
def test_zero_2_forms_adapted_weights_as_data_parallel_ranks_do_also_where_a_file_names_nvme(tmp_path):
    # DeepSpeed keeps on the CPU what this stage offloads, whatever the file calls the place.
    offloaded = ZERO[2] | {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    one, other = (
        run_ranks(2, lambda group, zero=zero: course(group, ABOVE, zero, products="formed"))[0]
        for zero in (DDP, offloaded)
    )
    assert_same_course(one, other, within=1e-6)


@pytest.mark.usefixtures("deepspeed")
def test_zero_3_trains_what_one_process_accumulates(alone):
    regime, expected = alone

    def in_both_forms(group):
        return [course(group, regime, ZERO[3], products=products) for products in ("factored", "per_use")]

    for found in run_ranks(2, in_both_forms)[0]:
        assert_same_course(found, expected)


# In the regime where the moments are smallest; each of its modes is held to one process in both.
@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("alone", [BELOW], indirect=True)
def test_a_run_passed_on_between_modes_trains_what_one_process_accumulates(alone, tmp_path):
    regime, expected = alone
    losses, norms = [], []
    third = STEPS // 3
    legs = [(2, ZERO[2], "auto"), (2, ZERO[3], "per_use"), (4, DDP, "auto")]
    for leg, (ranks, zero, products) in enumerate(legs):
        first, last = leg * third + 1, (leg + 1) * third
        train = functools.partial(course, regime=regime, zero=zero, first=first, last=last, kept=tmp_path)
        train = functools.partial(train, products=products)
        more_losses, more_norms, state = run_ranks(ranks, train)[0]
        losses += more_losses
        norms += more_norms
    assert_same_course((losses, norms, state), expected)
