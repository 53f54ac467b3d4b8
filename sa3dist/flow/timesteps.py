"""Timesteps: a truncated logit-normal draw, then the length-dependent shift towards noise."""

import math

import torch

# Source: spec/training.md 2.3. The cut at 0.075 removes the noisiest 0.6 % of the logit-normal, the rest is
# stretched to t = 1.
TRUNCATION = 0.075


def sample_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``count`` timesteps in (0, 1), after the flip and before the shift. Returns float32 of shape (count,).

    Source: spec/training.md 2.3.
    """
    # float64: in float32 the two normal distribution functions in a row lose the tail near t = 0.
    normal = torch.randn(count, generator=generator).double()
    lower = torch.special.ndtr(torch.logit(torch.tensor(TRUNCATION, dtype=torch.float64)))
    uniform = lower + (1 - lower) * torch.special.ndtr(normal)
    truncated = (torch.sigmoid(torch.special.ndtri(uniform)) - TRUNCATION) / (1 - TRUNCATION)
    return (1 - truncated).float()


def effective_frames(seconds_total: float, sample_rate_hz: int, samples_per_frame: int) -> int:
    """Length, in latent frames, that the timestep shift goes by: of the whole file, not of the crop."""
    return math.ceil(int(seconds_total * sample_rate_hz) / samples_per_frame)


def shift_timesteps(
    t_B: torch.Tensor,
    frames_B: torch.Tensor,
    min_length: int = 256,
    max_length: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> torch.Tensor:
    """Multiply the odds t / (1 - t) of every timestep by a factor that grows with the clip's length.

    t_B        timesteps in [0, 1]; 0 and 1 stay where they are
    frames_B   effective length of each clip in latent frames; clamped to [min_length, max_length]
    Returns t with the shape of t_B. Source: spec/training.md 2.4.
    """
    length = frames_B.to(t_B).clamp(min_length, max_length)
    # Equal bounds leave one length, at base_shift.
    slope = (max_shift - base_shift) / max(max_length - min_length, 1)
    shrink = torch.exp(-(base_shift + slope * (length - min_length)))
    # These operations in this order: features of frequency 1e4 turn one ulp of t into 1e-3 of velocity. t = 1 passes
    # through 1 / 0 = inf and comes out as 1.
    return 1 - shrink / (shrink + (1 / (1 - t_B) - 1))
