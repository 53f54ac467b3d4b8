"""What all ranks must hold alike and finite, and which of them does not."""

from __future__ import annotations

import socket

import torch

from sa3dist.adapters import tensors_digest
from sa3dist.errors import EnvironmentFailure
from sa3dist.parallel.group import Group


def name_the_non_finite(group: Group, step: int, losses: list[tuple[list[str], torch.Tensor]]) -> None:
    """Raises EnvironmentFailure on all ranks, with the clips whose loss is not finite; called on all.

    losses  (clip keys, loss) of each micro batch this rank had in the step
    """
    mine = [key for clips, loss in losses if not bool(loss.isfinite()) for key in clips]
    told = group.gather((mine, socket.gethostname()))
    clips = sorted({key for keys, _ in told for key in keys})
    found = f"loss of clip {', '.join(clips)}" if clips else "gradient"
    problem = EnvironmentFailure(
        f"step {step}: the {found} is not finite; training stopped, state is as last saved. "
        f"Look at that clip, or lower learning_rate"
    )
    problem.origin = next(((n, host) for n, (keys, host) in enumerate(told) if keys), (0, told[0][1]))
    raise problem


def check_ranks_agree(group: Group, step: int, adapters: dict[str, torch.Tensor]) -> None:
    """Raises EnvironmentFailure on all ranks when they hold different, empty or non-finite adapters."""
    bad = next((name for name, value in adapters.items() if not (value.numel() and value.isfinite().all())), None)
    held = group.gather((tensors_digest(adapters), bad))
    if len({digest for digest, _ in held}) > 1:
        raise EnvironmentFailure(f"step {step}: the ranks' adapters differ; state is as last saved")
    found = next((name for _, name in held if name is not None), None)
    if found is not None:
        raise EnvironmentFailure(f"step {step}: {found} is empty or not finite; state is as last saved")
