"""Memory that runs out under DeepSpeed ends the run, and ``on_oom: adapt`` says what the next start does."""

import dataclasses
import os

import pytest
import torch

from sa3dist import errors
from sa3dist.runtime import deepspeed_launch
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import make_trainer
from tests.helpers.zero_ranks import import_deepspeed

# The import of DeepSpeed, on two ranks.
pytestmark = pytest.mark.slow


def steps_that_do_not_fit(group, stage):
    """How a step ends whose forward pass does not fit into memory, on any rank, and whether it left the adapters.

    First of a run that does not adapt, then of one that does, then of one that recomputes blocks already.
    """
    whole = trainer.micro_batch_loss

    def short_of_memory(*arguments, **keywords):
        # On all ranks: one alone would leave its peers waiting for its tensors until they are told.
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    zero = {"stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    group = dataclasses.replace(group, deepspeed={"zero_optimization": zero})
    trainer.micro_batch_loss = short_of_memory
    try:
        made, batch = make_trainer(group, 2)
        before, ends = made.engine.adapters(), []
        for adapts, recomputes in [(False, False), (True, False), (True, True)]:
            made.plan = dataclasses.replace(made.plan, adapt_memory=adapts)
            made.base.gradient_checkpointing = recomputes
            with pytest.raises(errors.SA3DistError) as ended:
                made.take_step(iter([batch]), StopRequest())
            same = all(torch.equal(value, before[name]) for name, value in made.engine.adapters().items())
            ends.append((ended.type, str(ended.value), same))
        return ends
    finally:
        trainer.micro_batch_loss = whole


def all_ends(group):
    os.environ |= {"LOCAL_RANK": str(group.dist_rank), "WORLD_SIZE": "2"}
    os.environ[deepspeed_launch.FILE_VARIABLE] = "configs/deepspeed/zero2.json"
    deepspeed_launch.prepare_environment(on_cpu=True)
    return {stage: steps_that_do_not_fit(group, stage) for stage in (1, 2, 3)}


@pytest.fixture(scope="module")
def found():
    import_deepspeed()
    return run_ranks(2, all_ends, timeout_seconds=60)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_that_runs_out_ends_the_run_as_on_oom_says_and_leaves_the_adapters(found, stage):
    for rank in found:
        (failed, what, _), (adapted, next_start, _), (still, change, _) = rank[stage]
        assert (failed, adapted, still) == (errors.OutOfMemory, errors.RecomputeOnRestart, errors.EnvironmentFailure)
        assert "gradient_checkpointing=on" in what
        assert "run the same command to continue with recomputed blocks" in next_start
        assert "recomputing blocks is not enough" in change
        assert all(same for _, _, same in rank[stage])
