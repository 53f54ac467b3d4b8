"""Whether two runs trained the same, to the last bit, and where they differ if not."""

from pathlib import Path

import torch

from sa3dist.training import checkpoint
from tests.helpers.program import rows

SHOWN = 8


def assert_same_training(one: Path, other: Path) -> None:
    """The adapters of the newest checkpoints and every step's loss; a failure tells how far they are apart."""
    assert not (told := differences(one, other)), "\n".join(told)


def differences(one: Path, other: Path) -> list[str]:
    """A line for every loss and every tensor that differs, the first few of each kind; none where all are equal."""
    ours, theirs = (checkpoint.find(output_dir, "auto").adapters for output_dir in (one, other))
    assert ours.keys() == theirs.keys()
    first, second = ({row["step"]: row["loss"] for row in rows(run) if "loss" in row} for run in (one, other))
    assert first.keys() == second.keys()
    steps = [step for step in first if first[step] != second[step]]
    names = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    losses = [f"loss of step {step}: {first[step]!r}, {second[step]!r}" for step in steps]
    tensors = [f"{name}: {_distance(ours[name], theirs[name])}" for name in names]
    if not losses and not tensors:
        return []
    counts = f"{len(losses)} of {len(first)} losses and {len(tensors)} of {len(ours)} tensors differ"
    return [f"{counts}; {torch.get_num_threads()} threads now", *losses[:SHOWN], *tensors[:SHOWN]]


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    apart = ours.double() - theirs.double()
    relative = apart.norm() / ours.double().norm()
    return f"{relative:.1e} of its norm, at most {apart.abs().max():.1e}, {int((apart != 0).sum())} of {apart.numel()}"
