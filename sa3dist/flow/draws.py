"""Random draws of one sample: the generator of each draw, silence extension, inpainting mask and timestep."""

import hashlib
import itertools
import math

import torch

# Source: spec/training.md 2.7. Mean length of the encoded silence appended to a clip.
EXTENSION_SECONDS = 4.0
# Source: spec/training.md 2.8. Shares of random segments, full, causal.
MASK_TYPE_PROBABILITIES = (0.1, 0.8, 0.1)
MAX_SEGMENTS = 10
# Source: spec/training.md 2.3. The cut at 0.075 removes the noisiest 0.6 % of the logit-normal, the rest is
# stretched to t = 1.
TRUNCATION = 0.075


def generator_for(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """CPU generator of one draw.

    seed      the run's seed
    purpose   what is drawn, e.g. "noise"; two purposes never share a stream
    indices   the global sample slot, and an attempt where a draw can be repeated

    The parts are hashed, not added, so that neighbouring seeds and slots get unrelated states.
    """
    name = "/".join([str(seed), purpose, *map(str, indices)])
    state = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(state)


def require_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` has the shape ``expected``; torch would silently broadcast a batch of 1.

    Looks only at what the host knows: nothing waits for a device.
    """
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")


def draw_extension(scale_frames: float, generator: torch.Generator) -> int:
    """Frames of encoded silence to append to a clip: floor of an exponential draw with mean ``scale_frames``."""
    if scale_frames == 0:
        return 0
    return int(torch.empty(1, dtype=torch.float64).exponential_(1 / scale_frames, generator=generator).floor())


def _uniform_integer(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform over low..high, inclusive."""
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

    valid_frames   frames that count for this clip, including its silence extension
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


def sample_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``count`` timesteps in (0, 1), after the flip and before the shift. Returns float32 of shape (count,).

    Source: spec/training.md 2.3.
    """
    # float64: in float32 ndtr followed by ndtri loses the tail near t = 0.
    normal = torch.randn(count, generator=generator).double()
    lower = torch.special.ndtr(torch.logit(torch.tensor(TRUNCATION, dtype=torch.float64)))
    uniform = lower + (1 - lower) * torch.special.ndtr(normal)
    truncated = (torch.sigmoid(torch.special.ndtri(uniform)) - TRUNCATION) / (1 - TRUNCATION)
    return (1 - truncated).float()


def effective_frames(seconds_total: float, sample_rate_hz: int, samples_per_frame: int) -> int:
    """The length in latent frames that determines the timestep shift: of the whole file, not the crop."""
    return math.ceil(int(seconds_total * sample_rate_hz) / samples_per_frame)


def shift_timesteps(
    t_B: torch.Tensor,
    frames_B: torch.Tensor,
    min_length: int = 256,
    max_length: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> torch.Tensor:
    """Multiply the odds t / (1 - t) of each timestep by a factor that grows with the clip's length.

    t_B        timesteps in [0, 1]; 0 and 1 do not change
    frames_B   effective length of each clip in latent frames; clamped to [min_length, max_length]
    Returns t with the shape of t_B. Raises ValueError for another number of lengths. Source: spec/training.md 2.4.
    """
    require_shape("frames_B", frames_B, t_B.shape)
    length = frames_B.to(t_B).clamp(min_length, max_length)
    # max: equal bounds must not divide by zero.
    slope = (max_shift - base_shift) / max(max_length - min_length, 1)
    shrink = torch.exp(-(base_shift + slope * (length - min_length)))
    # Keep the order of operations: features of frequency 1e4 turn one ulp of t into 1e-3 of velocity. t = 1 needs no
    # special case: 1 / 0 is inf, and the result is 1.
    return 1 - shrink / (shrink + (1 / (1 - t_B) - 1))
