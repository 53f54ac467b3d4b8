"""The rectified-flow training step as pure functions of tensors and explicit generators.

Suffixes: B clips of the micro batch, D latent channels, T latent frames, 1 a broadcast axis.
Time: t = 0 is data, t = 1 is noise.
"""

from sa3dist.flow.draws import (
    draw_extension,
    draw_inpaint_mask,
    effective_frames,
    generator_for,
    sample_timesteps,
    shift_timesteps,
)
from sa3dist.flow.noising import couple_noise, draw_noise, masked_loss, noise_latents

__all__ = [
    "couple_noise",
    "draw_extension",
    "draw_inpaint_mask",
    "draw_noise",
    "effective_frames",
    "generator_for",
    "masked_loss",
    "noise_latents",
    "sample_timesteps",
    "shift_timesteps",
]
