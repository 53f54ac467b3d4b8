"""Passes replayed as graphs: the ordinary run's bits, and no graph where a replay differs or cannot be recorded.

On a CPU a recording is the function itself, run at each replay, as a graph's kernels are, on the tensors it was
recorded with; what only a CUDA graph does is in test_gpu_training.py.
"""

import dataclasses

import pytest
import torch

import sa3dist
from sa3dist.adapters import adapter_parameters, attach_adapter
from sa3dist.errors import EnvironmentFailure, OutOfMemory, RecomputeOnRestart
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import acceleration, cuda_graphs
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.trainer import Trainer
from tests.helpers.golden import golden
from tests.helpers.host_recorder import HostRecorder, NothingAsked
from tests.helpers.ranks import run_ranks
from tests.helpers.recorded_step import both_shapes
from tests.helpers.trainers import make_settings

ACCUMULATION = 2


class Watching(HostRecorder):
    """Nothing that is recorded may ask for a value."""

    def record(self, function):
        def watched():
            with NothingAsked():
                return function()

        return super().record(watched)


class Stale(HostRecorder):
    """Replays give what the first one gave: a value that was asked for while recording."""

    def record(self, function):
        value = []

        def replay():
            value.append(function())
            return tuple(loss * 1.01 for loss in value[0])

        return replay


class Unable(HostRecorder):
    def record(self, function):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("capture was invalidated")


class Twice(HostRecorder):
    """Adds a gradient two times."""

    def record(self, function):
        return lambda: (function(), function())[0]


def make_trainer(kind="dora-cols", group=None, settings=None):
    base = sa3dist.load_base(golden("tiny-sa3"))
    attach_adapter(base, kind, rank=4, seed=1)
    plan = RunPlan(9, ACCUMULATION, 2, 4, 42, {}, ["a", "b"], adapt_memory=True)
    return Trainer(
        base,
        adapter_parameters(base),
        settings or make_settings(learning_rate=1e-2),
        plan,
        group or Group(0, 1, torch.device("cpu")),
    )


def micro_batches(count, first=0):
    """Other values every time, of two shapes: whole, and one clip shorter."""
    whole, short = both_shapes()
    for number in range(first, first + count):
        noise = torch.randn(whole.noised_BDT.shape, generator=torch.Generator().manual_seed(number))
        batch = short if number % 3 == 2 else whole
        yield dataclasses.replace(batch, noised_BDT=batch.noised_BDT + noise, target_BDT=batch.target_BDT - noise)


def train(trainer, steps, first=0):
    batches = micro_batches(steps * ACCUMULATION, first)
    return [trainer.take_step(batches, StopRequest())["loss"] for _ in range(steps)]


def assert_equal_state(found, expected):
    for name, value in expected.engine.adapters().items():
        assert torch.equal(found.engine.adapters()[name], value), name


@pytest.mark.parametrize("kind", ["lora", "dora-rows", "bora"])
def test_a_run_with_graphs_is_the_ordinary_run(kind):
    ordinary, graphed, recorder = make_trainer(kind), make_trainer(kind), HostRecorder()
    graphed.record_graphs(recorder)
    expected, found = train(ordinary, 6), train(graphed, 6)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, value in ordinary.engine.adapters().items():
        torch.testing.assert_close(graphed.engine.adapters()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    # 8 of one shape and 4 of the other: the first two of each are ordinary passes.
    assert (recorder.recorded, recorder.replayed, graphed.graphs.shapes) == (2, 6 + 2, 2)
    assert len(set(expected)) == 6


@pytest.mark.parametrize(
    ("kind", "recomputed"),
    [("lora", False), ("dora-rows", False), ("bora", False), ("dora-cols-xs", False), ("bora", True)],
)
def test_a_pass_that_is_recorded_asks_no_tensor_for_its_value(kind, recomputed):
    trainer = make_trainer(kind)
    trainer.base.gradient_checkpointing = recomputed
    trainer.record_graphs(Watching())
    train(trainer, 5)
    assert trainer.graphs.shapes == 2
    whole, *_ = micro_batches(1)
    with pytest.raises(AssertionError, match="asks the device"), NothingAsked():
        whole.t_B.max().item()


@pytest.fixture(scope="module")
def ordinary_run():
    """A trainer that records nothing after five steps, and their losses."""
    trainer = make_trainer()
    return trainer, train(trainer, 5)


@pytest.mark.parametrize("recorder", [Stale, Twice, Unable])
def test_a_graph_that_errs_is_not_used_and_leaves_no_trace(recorder, ordinary_run, caplog):
    (ordinary, expected), graphed = ordinary_run, make_trainer()
    graphed.record_graphs(recorder())
    assert train(graphed, 5) == expected
    assert_equal_state(graphed, ordinary)
    assert caplog.text.count("training goes on without them") == 1
    assert ("them: operation not permitted when stream is capturing" in caplog.text) == (recorder is Unable)
    assert graphed.graphs.shapes == 0


@pytest.mark.parametrize(("noise", "kept"), [(3e-2, True), (0.0, False)])
def test_a_replay_may_be_as_far_off_as_an_ordinary_pass_done_again_and_no_further(monkeypatch, noise, kept):
    """Gradients of every ordinary pass are off by ``noise``; those of replays by 5e-2, beyond the plain limit."""
    trainer = make_trainer()
    trainer.record_graphs(HostRecorder())
    ordinary, draw = trainer.graphs._passes, torch.Generator().manual_seed(3)

    def off_by(share, run):
        before = trainer.engine.gradient.clone()
        losses = run()
        added = trainer.engine.gradient - before
        error = torch.randn(added.shape, generator=draw)
        trainer.engine.gradient += share * added.norm() / error.norm() * error
        return losses

    monkeypatch.setattr(trainer.graphs, "_passes", lambda batch, last: off_by(noise, lambda: ordinary(batch, last)))
    monkeypatch.setattr(trainer.graphs, "_recordable", lambda batch: off_by(5e-2, lambda: ordinary(batch, False)))
    train(trainer, 5)
    assert (trainer.graphs.shapes > 0) is kept


@pytest.mark.parametrize("exact", [False, True])
def test_a_deterministic_run_replays_what_gives_ordinary_bits_and_nothing_else(monkeypatch, exact):
    ordinary, graphed, off = make_trainer("lora"), make_trainer("lora"), make_trainer("lora")
    for trainer in (graphed, off):
        trainer.record_graphs(HostRecorder(), exact)
    recordable = off.graphs._recordable

    def one_bit_off(batch):
        losses = recordable(batch)
        gradient = off.engine.gradient
        place = gradient.abs().argmax()
        gradient[place] = torch.nextafter(gradient[place], torch.tensor(torch.inf))
        return losses

    monkeypatch.setattr(off.graphs, "_recordable", one_bit_off)
    expected = train(ordinary, 5)
    assert train(graphed, 5) == expected
    assert_equal_state(graphed, ordinary)
    assert graphed.graphs.shapes == 2
    found = train(off, 5)
    assert (off.graphs.shapes == 0) is exact
    if exact:
        assert found == expected
        assert_equal_state(off, ordinary)


def run_out(trainer, monkeypatch, times):
    """Out of memory at the end of the next passes that are no replays, so often."""
    forward, left = trainer.engine.losses, [times]

    def losses(batch):
        found = forward(batch)
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return found

    monkeypatch.setattr(trainer.engine, "losses", losses)


@pytest.fixture(scope="module")
def ordinary_losses():
    """Of four steps without graphs, and of three behind them."""
    trainer = make_trainer()
    return train(trainer, 4), train(trainer, 3, first=8)


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_takes_the_graphs_first_and_then_ends_the_run(
    monkeypatch, caplog, ordinary_losses, times, adapt
):
    trainer = make_trainer()
    trainer.plan = dataclasses.replace(trainer.plan, adapt_memory=adapt)
    trainer.record_graphs(HostRecorder())
    before, after = ordinary_losses
    assert train(trainer, 4) == pytest.approx(before, rel=1e-6)
    assert trainer.graphs.shapes == 1
    run_out(trainer, monkeypatch, times)
    if times == 2:
        kind = RecomputeOnRestart if adapt else OutOfMemory
        with pytest.raises(kind, match="to continue with recomputed blocks" if adapt else "try gradient_ch") as ended:
            train(trainer, 1, first=8)
        assert ended.type is kind
        assert trainer.step == 4
        assert not trainer.base.gradient_checkpointing
        return
    assert train(trainer, 3, first=8) == pytest.approx(after, rel=1e-6)
    assert trainer.graphs.shapes == 0
    assert caplog.text.count("step 5: out of memory on") == 1
    assert caplog.text.count("cuda_graphs are off from here on") == 1


@pytest.mark.parametrize("adapt", [False, True])
def test_memory_that_runs_out_while_clips_are_encoded_is_said_and_no_step_is_tried_again(adapt):
    trainer = make_trainer()
    trainer.plan = dataclasses.replace(trainer.plan, adapt_memory=adapt)
    trainer.record_graphs(HostRecorder())
    train(trainer, 2)

    def stream():
        raise torch.OutOfMemoryError("out of memory in the encoder")
        yield

    with pytest.raises(EnvironmentFailure, match="out of memory in the encoder") as ended:
        trainer.take_step(stream(), StopRequest())
    # 70: what encoding takes no recomputed block gives back.
    assert ended.type is EnvironmentFailure
    assert trainer.step == 2


def ranks_one_of_which_runs_out(group):
    torch.manual_seed(0)
    trainer = make_trainer(group=group)
    trainer.record_graphs(Unable() if group.dist_rank == 0 else HostRecorder())
    train(trainer, 4)
    with pytest.MonkeyPatch.context() as patch:
        if group.dist_rank == 1:
            run_out(trainer, patch, 1)
        return train(trainer, 3, first=8), trainer.engine.adapters(), trainer.may_drop_graphs


def test_ranks_that_hold_none_any_more_do_the_step_again_with_those_that_do():
    (losses, adapters, may_go), (same_losses, same_adapters, _) = run_ranks(2, ranks_one_of_which_runs_out)
    assert losses == same_losses
    assert all(torch.equal(adapters[name], same_adapters[name]) for name in adapters)
    assert not may_go


def two_ranks(group, graphed):
    torch.manual_seed(0)
    trainer = make_trainer(group=group)
    # Buckets small enough that some leave during the backward pass.
    trainer.engine.reduction = type(trainer.engine.reduction)(trainer.engine.flat, group, "none", 500)
    assert len(trainer.engine.reduction.buckets) > 2
    if graphed:
        trainer.record_graphs(HostRecorder())
    losses = train(trainer, 5, first=100 * group.dist_rank)
    return losses, trainer.engine.adapters(), trainer.graphs.shapes if graphed else 0


def test_ranks_that_replay_exchange_the_same_gradients():
    expected, found = (run_ranks(2, lambda group, on=on: two_ranks(group, on)) for on in (False, True))
    assert [shapes for _, _, shapes in found] == [2, 2]
    for (losses, adapters, _), (expected_losses, expected_adapters, _) in zip(found, expected, strict=True):
        assert losses == pytest.approx(expected_losses, rel=1e-6)
        for name, value in expected_adapters.items():
            torch.testing.assert_close(adapters[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_ever_new_shapes_record_no_more_than_the_limit(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 1)
    trainer, recorder = make_trainer(), HostRecorder()
    trainer.record_graphs(recorder)
    train(trainer, 6)
    assert (recorder.recorded, trainer.graphs.shapes) == (1, 1)


def test_what_a_pass_depends_on_beside_values_tells_shapes_apart():
    whole, _, short = micro_batches(3)
    longer = dataclasses.replace(short.packing, lengths=(short.packing.lengths[0], short.packing.lengths[1] - 1))
    changed = [
        whole,
        short,
        dataclasses.replace(short, packing=longer),
        dataclasses.replace(short, packing=None),
        dataclasses.replace(whole, has_context=not whole.has_context),
        dataclasses.replace(whole, prompt_length=77),
        dataclasses.replace(whole, hidden_BLH=whole.hidden_BLH[:, :3]),
        dataclasses.replace(whole, t_B=whole.t_B.double()),
    ]
    assert len({cuda_graphs.shape_of(batch) for batch in changed}) == len(changed)
    same = dataclasses.replace(whole, t_B=whole.t_B + 1, clips=["c", "d"], silent_crops=1)
    assert cuda_graphs.shape_of(same) == cuda_graphs.shape_of(whole)


@pytest.mark.parametrize("collectives", [False, True])
def test_a_run_that_is_told_to_records_unless_ranks_exchange_tensors_within_a_pass(monkeypatch, tmp_path, collectives):
    told = []
    monkeypatch.setattr(acceleration, "Recorder", lambda *given: told.append(given) or HostRecorder())
    told_to = {"compile": "off", "cuda_graphs": "on", "batch_size": 2, "work_dir": str(tmp_path)}
    trainer = make_trainer()
    trainer.engine.collectives_in_forward = collectives
    acceleration.choose_acceleration(trainer, make_settings(**told_to, gradient_checkpointing="on"), 24)
    assert (trainer.graphs is None) is collectives
    assert trainer.base.gradient_checkpointing
    if not collectives:
        # Room is left for the longest clips, which may come after a shorter one was recorded.
        trainer.base.gradient_checkpointing = False
        acceleration.choose_acceleration(trainer, make_settings(**told_to, gradient_checkpointing="off"), 48)
        (_, recomputed), (_, kept) = told
        assert 0 < 2 * recomputed < kept


@pytest.mark.parametrize("products", ["formed", "factored"])
def test_a_deterministic_run_records_where_adapted_weights_are_formed(monkeypatch, tmp_path, caplog, products):
    caplog.set_level("INFO")
    monkeypatch.setattr(acceleration, "Recorder", lambda *_: HostRecorder())
    told_to = {"compile": "off", "cuda_graphs": "on", "batch_size": 2, "work_dir": str(tmp_path)}
    settings = make_settings(**told_to, deterministic=True, adapter_products=products, gradient_checkpointing="off")
    trainer = make_trainer(settings=settings)
    acceleration.choose_acceleration(trainer, settings, 24)
    assert (trainer.graphs is not None) is (products == "formed")
    assert ("none of a deterministic run" in caplog.text) is (products == "factored")
    if products == "formed":
        assert trainer.graphs._exact


def test_auto_records_long_runs_on_cuda():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    chosen = [
        cuda_graphs.wants_graphs(choice, device, steps)
        for choice, device, steps in [
            ("auto", cuda, 300),
            ("auto", cpu, 300),
            ("auto", cuda, 10),
            ("on", cuda, 10),
            ("off", cuda, 300),
        ]
    ]
    assert chosen == [True, False, False, True, False]
