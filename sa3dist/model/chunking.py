"""The overlapping windows of frames in which a long clip is encoded and decoded, and the part of each that is used."""

from collections.abc import Iterator
from typing import NamedTuple

# In latent frames. Source: the reference's pretransform wrapper.
WINDOW_FRAMES = 128
OVERLAP_FRAMES = 32


class Window(NamedTuple):
    """Frames ``start .. stop``; ``keep .. stop`` of the result replace what earlier windows wrote there."""

    start: int
    stop: int
    keep: int


def windows(frames: int, phase: int, chunked: bool) -> Iterator[Window]:
    """The windows that cover a clip: one if the model is not chunked or the clip is short, else overlapping ones.

    phase   latent frames that attention treats as one chunk, 1 for a sliding window

    Windows have 128 frames and start 96 apart. The last one ends with the clip but starts at a multiple of ``phase``,
    because chunked attention groups frames by position. At inner edges half the overlap is dropped: a window lacks
    context there that its neighbour has.
    """
    if not chunked or frames <= WINDOW_FRAMES:
        yield Window(0, frames, 0)
        return
    starts = list(range(0, frames - WINDOW_FRAMES + 1, WINDOW_FRAMES - OVERLAP_FRAMES))
    if starts[-1] + WINDOW_FRAMES < frames:
        starts.append(-(-(frames - WINDOW_FRAMES) // phase) * phase)
    for start in starts:
        yield Window(start, min(start + WINDOW_FRAMES, frames), start + (OVERLAP_FRAMES // 2 if start else 0))
