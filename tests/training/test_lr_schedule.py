"""The learning rate: where it starts and ends, the same at every world size, recorded with the checkpoint."""

import json

import pytest
import torch

import sa3dist
from sa3dist import config, train
from sa3dist.adapters import adapter_parameters, attach_adapter
from sa3dist.errors import ConfigError
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import checkpoint, lr_schedule, resume
from sa3dist.training.lr_schedule import Schedule
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.trainer import Trainer
from tests.helpers.golden import golden
from tests.helpers.ranks import run_ranks
from tests.helpers.recorded_step import StepSettings, recorded_batch

STEPS, WARM_UP, PEAK = 6, 2, 2e-4


@pytest.mark.parametrize("decay", sorted(lr_schedule.DECAYS))
def test_after_the_warm_up_the_rates_are_those_of_transformers(decay):
    # Here, because every process of the suite reads this file, and this import takes a second.
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    name = "constant_with_warmup" if decay == "constant" else decay
    oracle = get_scheduler(name, optimizer, num_warmup_steps=WARM_UP, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    ours = Schedule(PEAK, STEPS, WARM_UP, decay)
    found = [ours.rate(step) for step in range(1, STEPS + 1)]
    assert found[WARM_UP:] == pytest.approx(expected[WARM_UP:], rel=1e-12)
    # Theirs starts with a step at rate 0; ours is one step ahead, so that every step trains.
    assert found[:WARM_UP] == pytest.approx(expected[1 : WARM_UP + 1], rel=1e-12)
    assert min(found) > 0


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_rate_falls_to_zero_one_step_after_the_last(decay):
    ours = Schedule(PEAK, STEPS, 0, decay)
    assert ours.rate(1) == PEAK
    assert ours.rate(STEPS + 1) == pytest.approx(0, abs=1e-18)


@pytest.mark.parametrize("warmup_steps", [5, 6])
def test_a_warm_up_that_never_ends_is_refused(warmup_steps):
    with pytest.raises(ConfigError, match="^warmup_steps: . leaves none of number_of_steps"):
        config.build({"audio_data_url": "clips.zip", "number_of_steps": 5, "warmup_steps": warmup_steps})


@pytest.fixture(scope="module")
def one_rank_curve():
    return curve_at(1, 1)


def curve_at(world_size, accumulation):
    """(lr of each step as reported, lr the optimiser used, adapter values) on every rank."""

    def work(group):
        base = sa3dist.load_base(golden("tiny-sa3"))
        attach_adapter(base, "lora", rank=2, seed=1)
        batch = recorded_batch(base)
        plan = RunPlan(
            STEPS,
            accumulation,
            2,
            2 * group.world_size,
            42,
            {},
            ["a"],
            schedule=Schedule(PEAK, STEPS, WARM_UP, "cosine"),
        )
        trainer = Trainer(base, adapter_parameters(base), StepSettings(), plan, group)
        rates, used = [], []
        for _ in range(STEPS):
            rates.append(trainer.take_step(iter([batch] * accumulation), StopRequest())["lr"])
            used.append(trainer.engine.flat.optimizer.learning_rate)
        return rates, used, trainer.engine.flat.values.detach().tolist()

    return run_ranks(world_size, work)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_the_curve_is_the_same_at_every_world_size(one_rank_curve, world_size, accumulation):
    (expected, _, adapters), *_ = one_rank_curve
    assert expected == [Schedule(PEAK, STEPS, WARM_UP, "cosine").rate(step) for step in range(1, STEPS + 1)]
    for rates, used, found in curve_at(world_size, accumulation):
        assert rates == used == expected
        torch.testing.assert_close(torch.tensor(found), torch.tensor(adapters), rtol=1e-4, atol=1e-6)


@pytest.fixture
def words(demo_base, demo_clips, demo_work):
    settings = {"audio_data_url": demo_clips, "model": demo_base, "work_dir": demo_work, "rank": 2, "duration": 2}
    settings |= {"number_of_steps": 6, "learning_rate": PEAK, "base_precision": "fp32", "mixed_precision": "no"}
    settings |= {"log_every": 1, "num_workers": 0, "warmup_steps": 2, "lr_scheduler": "linear", "save_every": 3}
    return [f"{key}={value}" for key, value in settings.items()]


def test_a_run_logs_the_rate_of_each_step_and_a_changed_schedule_is_said(words, tmp_path, caplog):
    output_dir = tmp_path / "run"
    assert train.main([*words, f"output_dir={output_dir}"]) == 0
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] / PEAK for row in rows] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    saved = checkpoint.load(checkpoint.path_of(output_dir, 6))
    assert Schedule(**saved.state["schedule"]) == Schedule(PEAK, 6, 2, "linear")
    settings = {"audio_data_url": "clips.zip", "number_of_steps": 8, "learning_rate": PEAK, "warmup_steps": 2}
    resume.check_changes(saved, config.build({**settings, "lr_scheduler": "linear"}))
    assert (
        "linear decay to 0 after step 8; it was 0.0002, 2 warm-up steps, linear decay to 0 after step 6" in caplog.text
    )


def test_more_steps_at_a_constant_rate_are_no_change():
    assert Schedule(PEAK, 5).same_rates(Schedule(PEAK, 50))
    assert not Schedule(PEAK, 5).same_rates(Schedule(PEAK, 5, warmup_steps=1))
    assert not Schedule(PEAK, 5, 0, "cosine").same_rates(Schedule(PEAK, 50, 0, "cosine"))
