"""Three ranks over gloo: what reduces their gradients, when it does, and that they begin with the same tensors."""

import pytest
import torch
import torch.distributed as dist
from sa3dist_kernels import ADAPTER_TYPES
from torch import nn

from sa3dist.adapters.layers import AdaptedLayer, initial_adapter
from sa3dist.errors import DataError
from sa3dist.parallel.build import share_initial_state
from sa3dist.parallel.flat_adamw import FlatAdapters
from sa3dist.parallel.gradient_buckets import GradientReduction
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import make_trainer

RANKS = 3
SHAPES = [(3, 5), (40,), (7, 11), (64,), (2, 2), (30,)]
WHOLE = 10**9


def inputs(rank):
    """What a rank's loss multiplies its parameters with: the gradients."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def reduced(rank, bucket_elements, compression="none", arm=True, fails=False):
    """One step's averaged gradient and scalars, and how many buckets left during the backward pass."""
    parameters = {f"p{i}": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(SHAPES)}
    flat = FlatAdapters(parameters, 0.1, 0.0, scalars=2)
    reduction = GradientReduction(flat, Group(rank, RANKS, torch.device("cpu")), compression, bucket_elements)
    reduction.reset()
    if arm and not fails:
        reduction.begin_last_backward()
    with pytest.MonkeyPatch.context() as patch:
        sent, send = [], dist.all_reduce
        patch.setattr(dist, "all_reduce", lambda *given, **how: sent.append(given) or send(*given, **how))
        if not fails:
            sum((p * x).sum() for p, x in zip(parameters.values(), inputs(rank), strict=True)).backward()
    early = len(sent)
    flat.scalars.copy_(torch.tensor([1.0, float(fails)]))
    reduction.finish()
    return flat.gradient.clone(), flat.scalars.clone(), early


def first_tensors(rank):
    """Tensors of a layer that every rank has made of another weight, before and after sharing."""
    generator = torch.Generator().manual_seed(100 + rank)
    layer = nn.Linear(12, 9)
    adapter = initial_adapter(ADAPTER_TYPES["bora-xs"], 4, torch.randn(9, 12, generator=generator), generator)
    adapted = AdaptedLayer(layer, ADAPTER_TYPES["bora-xs"], adapter, 1.0)
    group = Group(rank, RANKS, torch.device("cpu"))
    before = {name: value.clone() for name, value in [*adapter.named_parameters(), *adapter.named_buffers()]}
    share_initial_state(adapted.trained(), [adapted], group)
    return before, dict([*adapter.named_parameters(), *adapter.named_buffers()])


def fetched(rank):
    """How a rank fares with collectives in the forward pass when rank 1 finds no clip to train on."""

    def batches():
        if rank == 1:
            raise DataError("kick_03: unreadable")
        yield batch

    group = Group(rank, RANKS, torch.device("cpu"))
    trainer, batch = make_trainer(group, 3)
    trainer.engine.collectives_in_forward = True
    try:
        return trainer.take_step(batches(), StopRequest())
    except DataError as failure:
        return str(failure), failure.origin


def one_rank(group):
    rank = group.dist_rank
    return {
        "whole": reduced(rank, WHOLE),
        "early": reduced(rank, 40),
        "late": reduced(rank, 40, arm=False),
        "compressed": reduced(rank, 40, "bf16"),
        "failing": reduced(rank, 40, fails=rank == 1),
        "first": first_tensors(rank),
        "fetched": fetched(rank),
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(RANKS, one_rank)


@pytest.fixture(scope="module")
def mean():
    flats = [torch.cat([value.flatten() for value in inputs(rank)]).double() for rank in range(RANKS)]
    return torch.stack(flats).mean(0)


@pytest.mark.parametrize("how", ["whole", "early", "late"])
def test_every_rank_has_the_mean_gradient_and_the_summed_scalars(ranks, mean, how):
    for found in ranks:
        gradient, scalars, _ = found[how]
        torch.testing.assert_close(gradient.double(), mean, atol=1e-6, rtol=1e-6)
        assert scalars.tolist() == [RANKS, 0]


def test_buckets_that_leave_during_the_backward_pass_change_no_bit(ranks):
    for found in ranks:
        assert found["early"][2] > 1
        assert found["late"][2] == found["whole"][2] == 0
        assert torch.equal(found["early"][0], found["late"][0])


def test_compressed_gradients_are_the_mean_to_bfloat16_and_the_same_on_every_rank(ranks, mean):
    for found in ranks:
        gradient, scalars, _ = found["compressed"]
        # Each of three values and each of two sums is rounded to 8 bits.
        assert ((gradient.double() - mean).abs() <= 2**-8 * 5).all()
        assert (gradient.double() - mean).abs().max() > 1e-5
        assert torch.equal(gradient, ranks[0]["compressed"][0])
        assert scalars.tolist() == [RANKS, 0]


def test_a_rank_that_failed_before_its_last_backward_pass_joins_and_is_heard(ranks):
    for found in ranks:
        assert found["failing"][1].tolist() == [RANKS, 1]


def test_ranks_begin_with_rank_0s_adapters_and_frozen_constants(ranks):
    expected = ranks[0]["first"][0]
    assert {"left_OR", "right_IR", "M_xs", "row_squares_O"} <= expected.keys()
    assert any(not torch.equal(ranks[1]["first"][0][name], value) for name, value in expected.items())
    for found in ranks:
        assert all(torch.equal(found["first"][1][name], value) for name, value in expected.items())


def test_with_collectives_in_forward_a_rank_without_data_stops_all_before_they_wait_for_it(ranks):
    for found in ranks:
        text, origin = found["fetched"]
        assert "kick_03: unreadable" in text
        assert origin[0] == 1
