"""The training loss by timestep: each clip counts where its own t lies, over micro batches, steps and ranks."""

import json

import pytest
import torch

from sa3dist import flow
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import loss
from sa3dist.training.metrics import MetricsLogger
from sa3dist.training.row_files import METRICS_NAME
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import make_settings, make_trainer

WEIGHT = 0.5


def loss_of_clip(trainer, batch, row):
    """Of one clip of the micro batch, from the velocities of all."""
    with torch.no_grad():
        hidden = trainer.base.embed_prompts(batch.hidden_BLH, batch.prompt_mask_BL)
        velocity_BDT = trainer.base.velocity(
            batch.noised_BDT,
            batch.t_B,
            hidden,
            batch.prompt_mask_BL,
            batch.seconds_total_B,
            inpaint_mask_B1T=batch.inpaint_mask_B1T,
            inpaint_latents_BDT=batch.latents_BDT,
        )
    one = slice(row, row + 1)
    keep_BT = torch.ones_like(batch.inpaint_mask_B1T[one, 0])
    parts = velocity_BDT[one], batch.target_BDT[one], keep_BT, batch.inpaint_mask_B1T[one]
    return float(flow.masked_loss(*parts, context_weight=WEIGHT)[0])


def columns(group, output_dir, times, steps, log_every):
    """Rows of ``steps`` steps on one micro batch, and the losses of its clips at each of them."""
    settings = make_settings(context_weight=WEIGHT, log_every=log_every)
    trainer, batch = make_trainer(group, steps, settings=settings)
    batch.t_B = torch.tensor(times[group.dist_rank])
    metrics = MetricsLogger(trainer, output_dir, None, lambda step, text: None)
    found = []
    for step in range(1, steps + 1):
        found.append([loss_of_clip(trainer, batch, row) for row in range(2)])
        metrics.add(trainer.take_step(iter([batch]), StopRequest()), last=step == steps)
    return found


def rows(output_dir):
    text = (output_dir / METRICS_NAME).read_text()
    return [json.loads(line)["loss_by_timestep"] for line in text.splitlines()]


def test_a_row_has_the_means_of_the_clips_since_the_row_before_and_null_where_none_fell(tmp_path):
    losses = columns(Group(0, 1, torch.device("cpu")), tmp_path, [[0.1, 1.0]], steps=3, log_every=2)
    first, second = rows(tmp_path)
    for column, row in ((0, 0), (4, 1)):
        assert first[column] == pytest.approx((losses[0][row] + losses[1][row]) / 2, rel=1e-5)
        assert second[column] == pytest.approx(losses[2][row], rel=1e-5)
    assert first[1:4] == second[1:4] == [None] * 3


def test_the_clips_of_all_ranks_count(tmp_path):
    times = [[0.1, 0.5], [0.5, 0.7]]
    ranks = run_ranks(2, lambda group: columns(group, tmp_path, times, steps=1, log_every=1))
    (row,) = rows(tmp_path)
    by_time = {0: [ranks[0][0][0]], 2: [ranks[0][0][1], ranks[1][0][0]], 3: [ranks[1][0][1]]}
    for number, found in enumerate(row):
        expected = by_time.get(number)
        assert found == (expected and pytest.approx(sum(expected) / len(expected), rel=1e-5))


def test_the_clips_of_a_micro_batch_add_up_to_its_loss():
    trainer, batch = make_trainer(Group(0, 1, torch.device("cpu")), 1)
    found = trainer.engine.losses(batch)
    sums, clips = (torch.stack([found[name] for name in part]) for part in (loss.BY_TIME[:5], loss.BY_TIME[5:]))
    assert clips.sum() == 2
    torch.testing.assert_close(sums.sum() / 2, found["loss"].detach())
    assert not sums.requires_grad
