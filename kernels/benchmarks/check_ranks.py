"""Part ``ranks``: two processes that share the device must equal one process that accumulates two micro batches."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from check_run import write_clips
from command_runs import Command, command_environment, largest_difference
from results_file import Budget, ResultsFile

from sa3dist.model.tiny import write_tiny_base
from sa3dist.training import checkpoint

# Largest relative difference of losses. Only the order in which gradients are added differs.
LOSS_TOLERANCE = 1e-4
STEPS, LEARNING_RATE = 20, 1e-4
# Largest mean and single difference of adapter values, in units of the learning rate. A gradient that is all rounding
# can have either sign, which moves its value by one learning rate per step.
MEAN_TOLERANCE, SINGLE_TOLERANCE = 0.02, 2.0 * STEPS


def run(results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> bool:
    """Whether losses and adapters agreed. Always with a tiny base: what is checked is the exchange."""
    results.set(skipped=[])
    steps = 4 if tiny else STEPS
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        environment = command_environment(scratch, device)
        write_tiny_base(scratch / "base")
        write_clips(scratch / "clips.zip", 6)
        words = [
            f"model={scratch / 'base'}",
            f"audio_data_url={scratch / 'clips.zip'}",
            f"number_of_steps={steps}",
            f"learning_rate={LEARNING_RATE}",
            "base_precision=fp32",
            "mixed_precision=no",
            "global_batch_size=2",
            "duration=2",
            "log_every=1",
            "log_clips=true",
            "num_workers=1",
        ]
        rows, adapters = {}, {}
        # Both at once: starting takes most of the time.
        with (
            Command(environment, scratch / "one", [*words, f"work_dir={scratch / 'work-one'}"]) as one,
            Command(environment, scratch / "two", [*words, f"work_dir={scratch / 'work-two'}"], ranks=2) as two,
        ):
            for name, command in (("one process", one), ("two processes", two)):
                seconds = command.finish(budget.left())
                rows[name] = command.rows()
                adapters[name] = checkpoint.load(checkpoint.path_of(command.output_dir, steps)).adapters
                losses = [row["loss"] for row in rows[name]]
                results.add(what=name, seconds=seconds, losses=losses, said=command.output().splitlines()[-3:])
    return compare(results, rows, adapters)


def compare(results: ResultsFile, rows: dict[str, list[dict]], adapters: dict[str, dict[str, torch.Tensor]]) -> bool:
    (one, two), (mine, theirs) = rows.values(), adapters.values()
    losses = largest_difference(one, two)
    moved = torch.cat([(mine[name] - value).flatten() for name, value in theirs.items()]).abs() / LEARNING_RATE
    same_clips = [row["clips"] for row in one] == [row["clips"] for row in two]
    figures = {"mean": moved.mean().item(), "largest": moved.max().item()}
    agree = (
        same_clips
        and losses <= LOSS_TOLERANCE
        and figures["mean"] <= MEAN_TOLERANCE
        and figures["largest"] <= SINGLE_TOLERANCE
    )
    results.add(
        what="comparison",
        same_clips=same_clips,
        largest_relative_loss_difference=losses,
        adapters_apart_in_learning_rates=figures,
        agree=agree,
    )
    return agree
