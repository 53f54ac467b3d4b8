"""Integrated loudness by ITU-R BS.1770-4: K weighting, and gating of the powers of 100 ms pieces.

Suffixes: N samples, C channels, F bins, P pieces of 100 ms.
"""

import functools
import math

import numpy as np
import torch

PIECES_PER_SECOND = 10
# BS.1770-4: gating blocks of 400 ms every 100 ms. Blocks below -70 LUFS are dropped, then those 10 LU below the mean.
GATING_PIECES = 4
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
LUFS_OFFSET = -0.691
# Frequency of the shelf filter. At low sample rates it is limited to this share of the rate, to keep the filter stable.
SHELF_HZ = 1681.974450955533
SHELF_LIMIT = 0.45


def k_weighting(rate_hz: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(b, a) of BS.1770-4's two biquads, shelf and high pass, for any sample rate.

    Source: the standard tabulates 48 kHz only; these are the analogue prototypes of its tables, mapped bilinearly.
    """
    k, q = math.tan(math.pi * min(SHELF_HZ / rate_hz, SHELF_LIMIT)), 0.7071752369554196
    high = 10 ** (3.999843853973347 / 20)
    middle = high**0.4996667741545416
    a0 = 1 + k / q + k * k
    shelf_b = np.array([high + middle * k / q + k * k, 2 * (k * k - high), high - middle * k / q + k * k]) / a0
    shelf_a = np.array([1, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0])
    k, q = math.tan(math.pi * 38.13547087602444 / rate_hz), 0.5003270373238773
    a0 = 1 + k / q + k * k
    pass_a = np.array([1, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0])
    return (shelf_b, shelf_a), (np.array([1.0, -2.0, 1.0]), pass_a)


def k_weighted(samples_CN: np.ndarray, rate_hz: int) -> np.ndarray:
    """K-weighted float32 samples, filtered in the frequency domain.

    The transform is circular: the filters' response to the last samples wraps around into the first ones, so the first
    100 ms of the result are wrong. After 100 ms the response is below float32's rounding.
    """
    # Not torchaudio.functional.loudness: it clips the weighted signal at full scale (2.5 LU off for a full-scale tone
    # of 8 kHz), takes 380 MB for a minute of stereo, and is unstable at sample rates below 3 kHz.
    spectrum_CF = torch.fft.rfft(torch.from_numpy(samples_CN))
    # In place: allocating memory would take as long as both transforms.
    spectrum_CF *= _k_response(rate_hz, samples_CN.shape[1])
    return torch.fft.irfft(spectrum_CF, samples_CN.shape[1]).numpy()


@functools.lru_cache(maxsize=8)
def _k_response(rate_hz: int, samples: int) -> torch.Tensor:
    z_F = np.exp(-2j * np.pi * np.fft.rfftfreq(samples))
    response_F = np.ones_like(z_F)
    for b, a in k_weighting(rate_hz):
        response_F *= np.polyval(b[::-1], z_F) / np.polyval(a[::-1], z_F)
    return torch.from_numpy(response_F.astype(np.complex64))


def integrated_loudness(powers_P: np.ndarray) -> float:
    """LUFS from K-weighted mean squares, summed over channels, of consecutive 100 ms pieces (BS.1770-4, annex 1).

    powers_P   at least 4, the length of a gating block
    """
    blocks = np.convolve(powers_P, np.full(GATING_PIECES, 1 / GATING_PIECES), "valid")
    blocks = blocks[blocks > 10 ** ((ABSOLUTE_GATE_LUFS - LUFS_OFFSET) / 10)]
    if len(blocks) == 0:
        return -math.inf
    return lufs_of(blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE_LU / 10)].mean())


def lufs_of(power: float) -> float:
    """Ungated loudness of a K-weighted mean square."""
    return LUFS_OFFSET + 10 * math.log10(power) if power > 0 else -math.inf
