"""Part ``ranks``: two processes that share this machine's device are one process with two accumulated micro batches."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from check_run import write_clips
from command_runs import Command, command_environment, largest_difference
from results_file import Budget, ResultsFile

from sa3dist.model.tiny import write_tiny_base
from sa3dist.training import checkpoint

# The same micro batches by the same kernels; only the order in which their gradients are added differs.
LOSSES = 1e-4
STEPS, LEARNING_RATE = 20, 1e-4
# Share of one learning rate that an entry may be off on average, and the most that a single one may: the sign of a
# gradient that is all rounding moves an entry by one rate a step.
MEAN_SHARE, LARGEST_SHARE = 0.02, 2.0 * STEPS


def run(results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> bool:
    """Returns whether losses and adapters of the two agreed. A tiny base either way: what is tried is the exchange."""
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
        # Beside each other: each has a core or more to itself, and starting takes most of the time.
        with (
            Command(environment, scratch / "one", [*words, f"work_dir={scratch / 'work-one'}"]) as one,
            Command(environment, scratch / "two", [*words, f"work_dir={scratch / 'work-two'}"], ranks=2) as two,
        ):
            for name, command in (("one process", one), ("two processes", two)):
                seconds = command.finish(budget.left())
                rows[name] = command.rows()
                adapters[name] = checkpoint.load(checkpoint.path_of(command.output_dir, steps)).adapters
                losses = [row["loss"] for row in rows[name]]
                results.add(what=name, seconds=seconds, losses=losses, said=command.said().splitlines()[-3:])
    return compare(results, rows, adapters)


def compare(results: ResultsFile, rows: dict[str, list[dict]], adapters: dict[str, dict[str, torch.Tensor]]) -> bool:
    (one, two), (mine, theirs) = rows.values(), adapters.values()
    losses = largest_difference(one, two)
    moved = torch.cat([(mine[name] - value).flatten() for name, value in theirs.items()]).abs() / LEARNING_RATE
    same_clips = [row["clips"] for row in one] == [row["clips"] for row in two]
    figures = {"mean": moved.mean().item(), "largest": moved.max().item()}
    agree = same_clips and losses <= LOSSES and figures["mean"] <= MEAN_SHARE and figures["largest"] <= LARGEST_SHARE
    results.add(
        what="comparison",
        same_clips=same_clips,
        largest_relative_loss_difference=losses,
        adapters_apart_in_learning_rates=figures,
        agree=agree,
    )
    return agree
