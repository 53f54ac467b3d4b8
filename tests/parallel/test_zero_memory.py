"""A rank that runs out of memory under DeepSpeed: all ranks do the micro batch again, or are told why they cannot."""

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

# The import of DeepSpeed, on two ranks.
pytestmark = pytest.mark.slow

STEPS, ACCUMULATION = 2, 2


def train(group, stage, failing=(), **plan):
    """Losses, adapters, moments and where memory ran out; or how it ended.

    failing   (rank, call) pairs of micro batches that do not fit
    """
    whole, calls = trainer.micro_batch_loss, iter(range(1, 99))

    def short_of_memory(*arguments, **keywords):
        if (group.dist_rank, next(calls)) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return whole(*arguments, **keywords)

    zero = {"stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    group = dataclasses.replace(group, deepspeed={"zero_optimization": zero})
    trainer.micro_batch_loss = short_of_memory
    try:
        made, batch = make_trainer(group, STEPS, accumulation=ACCUMULATION, **plan)
        losses = [made.take_step(iter([batch] * ACCUMULATION), StopRequest())["loss"] for _ in range(STEPS)]
    except (errors.SA3DistError, RuntimeError) as failure:
        return type(failure), str(failure)
    finally:
        trainer.micro_batch_loss = whole
    return losses, made.engine.adapters(), made.engine.moments(), made.adapted_at


def train_all(group):
    os.environ |= {"LOCAL_RANK": str(group.dist_rank), "WORLD_SIZE": "2"}
    os.environ[deepspeed_launch.FILE_VARIABLE] = "configs/deepspeed/zero2.json"
    deepspeed_launch.prepare_environment(on_cpu=True)
    found = {}
    for stage in (1, 2):
        found[stage, "plain"] = train(group, stage)
        found[stage, "adapted"] = train(group, stage, failing=[(1, 4)], adapt_memory=True)
    found["again"] = train(group, 2, failing=[(1, 4), (1, 5)], adapt_memory=True)
    # On both: one alone would leave the other waiting for its tensors until it is told.
    found[3] = train(group, 3, failing=[(0, 1), (1, 1)], adapt_memory=True)
    return found


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("deepspeed")
    return run_ranks(2, train_all, timeout_seconds=60)


@pytest.mark.parametrize("stage", [1, 2])
def test_memory_short_on_one_rank_is_adapted_to_by_all_and_changes_no_bit(found, stage):
    for rank in found:
        losses, adapters, moments, adapted_at = rank[stage, "adapted"]
        expected_losses, expected_adapters, expected_moments, never = rank[stage, "plain"]
        assert (adapted_at, never) == (2, None)
        assert losses == expected_losses
        assert len(set(losses)) == STEPS
        assert all(torch.equal(adapters[name], value) for name, value in expected_adapters.items())
        for moment, tensors in expected_moments.items():
            assert all(torch.equal(moments[moment][name], value) for name, value in tensors.items())


def test_memory_still_short_with_recomputed_blocks_ends_all_ranks_with_what_to_change(found):
    for rank in found:
        kind, message = rank["again"]
        assert kind is errors.EnvironmentFailure
        assert "recomputing blocks is not enough" in message


def test_stage_3_says_that_it_cannot_do_the_step_again(found):
    for rank in found:
        kind, message = rank[3]
        assert kind is errors.EnvironmentFailure
        assert "under ZeRO-3" in message
        assert "gradient_checkpointing=on" in message
