"""Sampling: the inference schedule, guidance, and the steps from noise to latents.

Legend: B batch, C latent channels, T latent frames, S context tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sa3dist.model.base import Base

# Norm floors of the projection without and with a padding mask. Source: the reference's guidance.
NORM_FLOOR = 1e-12
MASKED_NORM_FLOOR = 1e-8
# Log-SNR of the schedule at t = 1 and at t = 0. Source: the reference's inference.
LOGSNR_START, LOGSNR_END = -6.2, 2.0


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How the conditional and the null velocity are combined; the defaults are the reference's.

    scale     1 runs only the conditional branch
    apg       1 keeps only the part of the difference orthogonal to the estimate, 0 keeps all of it
    rescale   0 keeps the velocity's standard deviation, 1 sets it to the conditional velocity's
    """

    scale: float = 1.0
    apg: float = 1.0
    rescale: float = 0.0


def logsnr_schedule(steps: int, sigma_max: float = 1.0) -> Tensor:
    """Timesteps from ``sigma_max`` to 0, (steps + 1,) float32, spaced evenly in log signal-to-noise ratio.

    For sigma_max < 1 the grid is warped before its first entry is set, so it is not monotonic, as in the reference.
    """
    t = torch.linspace(sigma_max, 0, steps + 1, dtype=torch.float32)
    warped = torch.sigmoid(-(LOGSNR_END - t * (LOGSNR_END - LOGSNR_START)))
    warped[t <= 0] = 0.0
    warped[t >= 1] = 1.0
    warped[0] = sigma_max
    return warped


def combine(
    cond_BCT: Tensor, null_BCT: Tensor, x_BCT: Tensor, t_B: Tensor, guidance: Guidance, keep_BT: Tensor | None = None
) -> Tensor:
    """Guided velocity from the two branches, (B, C, T) float32.

    cond, null   velocities of the two branches
    x            the noisy latents they were predicted from
    keep_BT      True = valid frame; the projection ignores the rest
    Source: adaptive projected guidance, arXiv:2410.02416, in the space of the denoised estimate.
    """
    sigma = t_B.float()[:, None, None]
    estimate, null = x_BCT - sigma * cond_BCT, x_BCT - sigma * null_BCT
    difference = estimate - null
    step = guidance.apg * orthogonal(difference, estimate, keep_BT) + (1 - guidance.apg) * difference
    velocity = (x_BCT - (estimate + (guidance.scale - 1) * step)) / sigma
    if not guidance.rescale:
        return velocity
    spread = cond_BCT.std(dim=1, keepdim=True) / velocity.std(dim=1, keepdim=True)
    return guidance.rescale * velocity * spread + (1 - guidance.rescale) * velocity


def orthogonal(difference_BCT: Tensor, estimate_BCT: Tensor, keep_BT: Tensor | None) -> Tensor:
    """The part of ``difference`` orthogonal to ``estimate``, over channels and time jointly, in float32."""
    difference, estimate, floor = difference_BCT.float(), estimate_BCT.float(), NORM_FLOOR
    if keep_BT is not None:
        keep = keep_BT[:, None].float()
        estimate, floor = estimate * keep, MASKED_NORM_FLOOR
    norm = torch.linalg.vector_norm(estimate, dim=(1, 2), keepdim=True).clamp_min(floor)
    direction = estimate / norm
    rest = difference - (difference * direction).sum(dim=(1, 2), keepdim=True) * direction
    return rest if keep_BT is None else rest * keep


def guided_velocity(
    network: Callable[..., Tensor],
    x_BCT: Tensor,
    t_B: Tensor,
    cross_BSC: Tensor,
    global_BC: Tensor,
    local_BCT: Tensor | None,
    guidance: Guidance,
    keep_BT: Tensor | None = None,
    null_cross_BSC: Tensor | None = None,
) -> Tensor:
    """Velocity with guidance: both branches in one doubled batch through ``network`` (the DiT).

    null_cross_BSC   what the null branch attends to; None means zeros. For a negative prompt see ``negative_cross``
    """
    if guidance.scale == 1:
        return network(x_BCT, t_B, cross_BSC, global_BC, local_BCT, keep_BT)
    null = torch.zeros_like(cross_BSC) if null_cross_BSC is None else null_cross_BSC

    def twice(value: Tensor | None) -> Tensor | None:
        # One row may stand for the whole batch already.
        return value if value is None or len(value) == 1 != len(x_BCT) else torch.cat([value, value])

    both = torch.cat([cross_BSC, null])
    velocity = network(twice(x_BCT), twice(t_B), both, twice(global_BC), twice(local_BCT), twice(keep_BT))
    cond, null = velocity.chunk(2)
    return combine(cond, null, x_BCT, t_B, guidance, keep_BT)


def negative_cross(cross_BSC: Tensor, mask_BS: Tensor) -> Tensor:
    """A negative prompt's sequence: positions with mask 0 are zero vectors, not the learned padding."""
    return torch.where(mask_BS.bool()[..., None], cross_BSC, cross_BSC.new_zeros(()))


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise_BCT: Tensor, schedule: Tensor) -> Tensor:
    """Integrate from noise to latents; ``velocity(x, t_B)`` is not evaluated at t = 0."""
    x = noise_BCT
    # Read the schedule to the host once, not once per step.
    times = schedule.tolist()
    for now, then in zip(times[:-1], times[1:], strict=True):
        x = x + (then - now) * velocity(x, x.new_full((len(x),), now))
    return x


def ping_pong(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise_BCT: Tensor,
    schedule: Tensor,
    fresh_noise: Callable[[int], Tensor],
) -> Tensor:
    """From noise to latents with a post-trained model: each step's estimate, except the last, is noised again.

    fresh_noise   standard normals shaped like ``noise_BCT``, by step, counted from 1
    """
    x, times = noise_BCT, schedule.tolist()
    for step, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True), start=1):
        x = x - now * velocity(x, x.new_full((len(x),), now))
        if then:
            x = (1 - then) * x + then * fresh_noise(step)
    return x


@torch.no_grad()
def sample(
    base: Base,
    noise: Callable[[int], Tensor],
    prompts: tuple[Tensor, Tensor],
    seconds: float,
    steps: int,
    guidance: Guidance,
    negative_prompts: tuple[Tensor, Tensor] | None = None,
    keep_BT: Tensor | None = None,
    before_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents (B, D, T) of prompts, for ``base.decode_latents``.

    noise         by step, float32 (B, D, T): step 0 starts the sampling, later steps are for post-trained models
    prompts       from ``base.encode_prompts``
    seconds       length of each clip
    keep_BT       True = valid frame; None: all are
    before_step   called before each evaluation of the network; an exception ends the sampling
    """
    start_BDT = noise(0)
    seconds_B = torch.full((len(start_BDT),), seconds, device=start_BDT.device)
    cross, embed = base.assemble(*prompts, seconds_B)
    null = None
    if negative_prompts is not None:
        mask = torch.nn.functional.pad(negative_prompts[1], (0, 1), value=1)
        null = negative_cross(base.assemble(*negative_prompts, seconds_B)[0], mask)
    local = base.local_conditioning(None, None)

    def velocity(x: Tensor, t_B: Tensor) -> Tensor:
        before_step()
        return guided_velocity(base.dit, x, t_B, cross, embed, local, guidance, keep_BT, null)

    schedule = logsnr_schedule(steps)
    if base.config.post_trained:
        return ping_pong(velocity, start_BDT, schedule, noise)
    return euler(velocity, start_BDT, schedule)
