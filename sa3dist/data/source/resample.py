"""Bring decoded samples to the model's sample rate and two channels. Suffixes: C channels, N samples."""

import math

import numpy as np
import torch

# Limit of torchaudio's table, one filter per output phase: 0.6 MB for the usual rates, 8 GB for 48,001 to 44,100 Hz.
MAX_FILTER_TABLE = 1 << 20


def ready_audio(audio_CN: np.ndarray, bounded: bool, from_hz: int, to_hz: int) -> torch.Tensor:
    """Convert decoded samples to what ``load_clip_audio`` returns: stereo, resampled, in [-1, 1].

    bounded   whether the samples are known to be in [-1, 1]
    """
    samples_CN = torch.from_numpy(audio_CN[:2])
    if from_hz != to_hz:
        samples_CN, bounded = resample(samples_CN, from_hz, to_hz), False
    if not bounded:
        samples_CN.clamp_(-1, 1)
    return samples_CN.expand(2, -1).contiguous()


def resampled_length(samples: int, from_hz: int, to_hz: int) -> int:
    """Number of samples that ``resample`` returns: ceil(samples * to / from), in exact integers."""
    return -(-samples * to_hz // from_hz)


def resample(audio_CN: torch.Tensor, from_hz: int, to_hz: int) -> torch.Tensor:
    """torchaudio's default sinc resampler (Hann window of 6 zero crossings, roll-off 0.99), for any pair of rates.

    audio_CN  float32, any number of channels. Returns float32 (channels, resampled_length).
    Source: torchaudio.functional.resample. For rates with a small common divisor its table of filters would be too
    large; the same filter is then evaluated per output sample. Unlike torchaudio, lengths above 2^24 are exact.
    """
    if from_hz == to_hz:
        return audio_CN.clone()
    divisor = math.gcd(from_hz, to_hz)
    old, new = from_hz // divisor, to_hz // divisor
    width = math.ceil(6 * old / (min(old, new) * 0.99))
    if new * (2 * width + old) <= MAX_FILTER_TABLE:
        from torchaudio.functional import resample as tabulated

        resampled_CN = tabulated(audio_CN, old, new)
    else:
        resampled_CN = _resample_by_sample(audio_CN, old, new, width)
    missing = resampled_length(audio_CN.shape[-1], old, new) - resampled_CN.shape[-1]
    return resampled_CN if missing == 0 else torch.nn.functional.pad(resampled_CN, (0, missing))


def _resample_by_sample(audio_CN: torch.Tensor, old: int, new: int, width: int) -> torch.Tensor:
    """out[j] = sum over k of x[k] h(k/old - j/new), taps within ``width`` of the centre, in float64."""
    length = resampled_length(audio_CN.shape[-1], old, new)
    base = min(old, new) * 0.99
    taps_K = torch.arange(-width, width + 2)
    padded_CN = torch.nn.functional.pad(audio_CN.double(), (width, width + 2))
    out_CN = torch.empty(audio_CN.shape[0], length)
    # About 32 MB per intermediate.
    step = max(1, (1 << 22) // len(taps_K))
    for start in range(0, length, step):
        position_J = torch.arange(start, min(start + step, length)) * old
        centre_J, rest_J = position_J // new, position_J % new
        t_JK = (taps_K[None].double() - rest_J[:, None].double() / new) * (base / old)
        t_JK.clamp_(-6, 6)
        filter_JK = torch.sinc(t_JK) * torch.cos(t_JK * (math.pi / 12)) ** 2 * (base / old)
        window_CJK = padded_CN[:, centre_J[:, None] + taps_K[None] + width]
        out_CN[:, start : start + len(position_J)] = (window_CJK * filter_JK).sum(-1).float()
    return out_CN
