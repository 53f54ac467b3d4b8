"""Checks that all ranks hold equal, finite tensors; errors name the rank, the clip or the tensor."""

import socket

import torch

from sa3dist.adapters import adapted_layers
from sa3dist.errors import EnvironmentFailure
from sa3dist.model.base import Base
from sa3dist.model.checkpoint import tensors_digest
from sa3dist.runtime.process_group import Group


def name_the_non_finite(group: Group, step: int, losses: list[tuple[list[str], torch.Tensor]]) -> None:
    """Raises EnvironmentFailure, naming the clips whose loss is not finite; all ranks call it and all raise.

    losses  (clip keys, loss) of each micro batch of this rank in the step
    """
    mine = [key for clips, loss in losses if not bool(loss.isfinite()) for key in clips]
    told = group.gather((mine, socket.gethostname()))
    clips = sorted({key for keys, _ in told for key in keys})
    found, look = (
        (f"loss of clip {', '.join(clips)}", "Look at that clip, or lower") if clips else ("gradient", "Lower")
    )
    problem = EnvironmentFailure(
        f"step {step}: the {found} is not finite; training stopped, state is as last saved. {look} learning_rate"
    )
    problem.origin = next(((n, host) for n, (keys, host) in enumerate(told) if keys), (0, told[0][1]))
    raise problem


def check_ranks_agree(group: Group, step: int, adapters: dict[str, torch.Tensor]) -> None:
    """Raises EnvironmentFailure on all ranks when they hold different, empty or non-finite adapters."""
    bad = next((name for name, value in adapters.items() if not (value.numel() and value.isfinite().all())), None)
    # Every save calls this: a single rank, which cannot differ, skips the digest.
    held = group.gather((tensors_digest(adapters) if group.world_size > 1 else "", bad))
    if len({digest for digest, _ in held}) > 1:
        raise EnvironmentFailure(f"step {step}: the ranks' adapters differ; state is as last saved")
    found = next((name for _, name in held if name is not None), None)
    if found is not None:
        raise EnvironmentFailure(f"step {step}: {found} is empty or not finite; state is as last saved")


def check_same_start(group: Group, step: int, base: Base, adapters: dict[str, torch.Tensor]) -> None:
    """Raises EnvironmentFailure on all ranks unless their adapters, constants and frequency tables are equal.

    Called before the first step. A difference of one bit here would train two different models.
    step   the step that training continues after
    """
    check_ranks_agree(group, step, adapters)
    if group.world_size == 1:
        return
    layers = adapted_layers(base)
    held = {
        "frequency tables": base.frequency_tables(),
        "frozen norms and singular bases": {
            f"{name}.{constant}": value
            for name, layer in layers.items()
            for constant, value in layer.adapter.named_buffers()
        },
    }
    ranks = group.gather({what: tensors_digest(tensors) for what, tensors in held.items()})
    for what in held:
        other = next((n for n, digests in enumerate(ranks) if digests[what] != ranks[0][what]), None)
        if other is not None:
            raise EnvironmentFailure(
                f"step {step}: the {what} of rank {other} on {group.hosts[other]} are not those of rank 0 on "
                f"{group.hosts[0]}; give all ranks the same model file and the same version of sa3dist"
            )
