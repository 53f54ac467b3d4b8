"""The length of a run's crops."""

import pytest

from sa3dist.flow.crops import crop_frames


@pytest.mark.parametrize(
    ("duration", "longest", "native", "frames"),
    [
        (None, 5.0, 380, 53),  # floor(5 * 44100 / 4096)
        (None, 999.0, 380, 4091),
        (380, 5.0, 380, 4091),
        (380, 5.0, 120, 1291),
        (12.0, 5.0, 380, 129),
        (None, 0.01, 380, 1),
    ],
)
def test_the_crop_is_the_duration_or_the_longest_clip_capped_and_floored(duration, longest, native, frames):
    assert crop_frames(duration, longest, native, 44100, 4096) == frames
