"""Draw the silence extension and the inpainting mask of one clip: which frames count, and which are given."""

import itertools

import torch

# Source: spec/training.md 2.7. Mean length of the encoded silence shown behind a clip.
EXTENSION_SECONDS = 4.0
# Source: spec/training.md 2.8. Shares of random segments, full, causal.
MASK_TYPE_PROBABILITIES = (0.1, 0.8, 0.1)
MAX_SEGMENTS = 10


def draw_extension(scale_frames: float, generator: torch.Generator) -> int:
    """Frames of encoded silence to show behind one clip: the floor of an exponential with mean ``scale_frames``."""
    if scale_frames == 0:
        return 0
    return int(torch.empty(1, dtype=torch.float64).exponential_(1 / scale_frames, generator=generator).floor())


def _uniform_integer(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform over low..high, both ends possible."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _random_segments(mask_T: torch.Tensor, valid_frames: int, generator: torch.Generator) -> None:
    count = _uniform_integer(1, MAX_SEGMENTS, generator)
    longest = max(1, valid_frames // count)
    for _ in range(count):
        length = _uniform_integer(1, longest, generator)
        start = _uniform_integer(0, valid_frames - length, generator)
        mask_T[start : start + length] = 0


def _full(mask_T: torch.Tensor, valid_frames: int, generator: torch.Generator) -> None:
    mask_T.zero_()


def _causal(mask_T: torch.Tensor, valid_frames: int, generator: torch.Generator) -> None:
    mask_T[_uniform_integer(0, valid_frames, generator) : valid_frames] = 0


MASK_TYPES = (_random_segments, _full, _causal)


def draw_inpaint_mask(valid_frames: int, total_frames: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the inpainting mask of one clip from the training mix of types.

    valid_frames   frames that count for this clip, its silence extension included
    total_frames   length of the mask; frames from valid_frames on are never context
    Returns float32 of shape (total_frames,): 1 = given context, 0 = to generate. A clip without valid frames keeps
    ones everywhere unless its type is full. Source: spec/training.md 2.8.
    """
    if not 0 <= valid_frames <= total_frames:
        raise ValueError(f"valid_frames is {valid_frames}, expected 0..{total_frames}")
    mask_T = torch.ones(total_frames)
    uniform = float(torch.rand(1, generator=generator))
    kind = MASK_TYPES[sum(uniform >= bound for bound in itertools.accumulate(MASK_TYPE_PROBABILITIES[:-1]))]
    if valid_frames > 0 or kind is _full:
        kind(mask_T, valid_frames, generator)
        mask_T[valid_frames:] = 0
    return mask_T
