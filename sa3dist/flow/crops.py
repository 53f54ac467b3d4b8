"""The part of a clip that a sample slot trains on: crop length, seeded start, and polarity."""

import math

import torch

from sa3dist.flow.draws import generator_for

# -60 dBFS. Quieter crops are drawn again, quieter clips are rejected. Source: spec/training.md 4.2, item 5.
SILENCE_PEAK = 1e-3
MAX_CROP_DRAWS = 8


def crop_frames(
    duration: float | None, longest_seconds: float, native_seconds: float, sample_rate_hz: int, samples_per_frame: int
) -> int:
    """Training length in latent frames, at least 1: ``duration`` or else the longest clip, up to the native length.

    Floored to whole frames, as in the reference (spec/training.md 3, sample size).
    """
    seconds = min(longest_seconds if duration is None else duration, native_seconds)
    # 1e-6: float rounding below a whole number of samples must not lose a frame.
    return max(1, math.floor(seconds * sample_rate_hz + 1e-6) // samples_per_frame)


def draw_crop(peaks_T: torch.Tensor, limit: int, seed: int, slot: int) -> tuple[int, bool]:
    """Start frame of the crop, and whether it is still silent after the last allowed draw."""
    spare = len(peaks_T) - limit
    if spare <= 0:
        return 0, bool(peaks_T.max() < SILENCE_PEAK)
    for attempt in range(MAX_CROP_DRAWS + 1):
        start = int(torch.randint(0, spare + 1, (1,), generator=generator_for(seed, "crop", slot, attempt)))
        if peaks_T[start : start + limit].max() >= SILENCE_PEAK:
            return start, False
    return start, True


def polarity_of_slot(seed: int, slot: int) -> bool:
    """Whether the clip is phase-flipped in this slot: probability 1/2 (spec/training.md 4.2, item 6)."""
    return bool(torch.rand(1, generator=generator_for(seed, "flip", slot)) < 0.5)
