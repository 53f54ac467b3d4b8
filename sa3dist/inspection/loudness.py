"""Loudness by ITU-R BS.1770-4: the K weighting, the power of pieces of 100 ms under it, and their gating.

Suffixes: N samples, C channels, F bins, P pieces of 100 ms.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from sa3dist.inspection.piece_energy import COLUMNS, PieceEnergy

PIECES_PER_SECOND = 10
# BS.1770-4: gating blocks of 400 ms every 100 ms; below -70 LUFS silence; then 10 LU below the mean of the rest.
GATING_PIECES = 4
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
LUFS_OFFSET = -0.691
# The shelf begins here. Where a sample rate is too low for it, it stays below half of that: a filter must not explode.
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


@functools.lru_cache(maxsize=32)
def k_energy(rate_hz: int) -> PieceEnergy:
    """Measures the energy of K-weighted pieces of 100 ms, to the next length that the matrices come to (0.1 %)."""
    return PieceEnergy(k_weighting(rate_hz), _piece_counts(rate_hz / PIECES_PER_SECOND))


def _piece_counts(samples: float) -> tuple[int, ...]:
    """Three numbers whose product is as near to ``samples`` as any, and of those with the least work."""

    def cost(counts: tuple[int, int, int]) -> tuple[float, float]:
        inner, middle, outer = counts
        # Columns of the products times their rows, per sample; BLAS works at half its speed on small ones.
        work = -(-(inner + 4) // COLUMNS) * COLUMNS + (32 * middle + 32) / inner + (32 * outer + 32) / (inner * middle)
        return abs(inner * middle * outer - samples), work + 400 / inner

    inners, middles = range(16, 65), range(1, 33)
    choices = ((i, m, max(1, round(samples / (i * m)))) for i in inners for m in middles)
    return tuple(count for count in min(choices, key=cost) if count > 1)


def integrated_loudness(powers_P: np.ndarray) -> float:
    """LUFS of K-weighted mean squares, summed over channels, of whole consecutive 100 ms pieces (BS.1770-4, annex 1).

    powers_P   at least 4: what is shorter than a gating block has no integrated loudness
    """
    blocks = np.convolve(powers_P, np.full(GATING_PIECES, 1 / GATING_PIECES), "valid")
    blocks = blocks[blocks > 10 ** ((ABSOLUTE_GATE_LUFS - LUFS_OFFSET) / 10)]
    if len(blocks) == 0:
        return -math.inf
    return _lufs(blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE_LU / 10)].mean())


def ungated_loudness(samples_NC: np.ndarray, rate_hz: int) -> float:
    """LUFS of all of a short clip: its K-weighted power by the filters' frequency response, in float64."""
    # The response to the last sample has died away before it comes round to the first.
    size = len(samples_NC) + rate_hz // PIECES_PER_SECOND
    z_F = np.exp(-2j * np.pi * np.fft.rfftfreq(size))
    response_F = np.ones_like(z_F)
    for b, a in k_weighting(rate_hz):
        response_F *= np.polyval(b[::-1], z_F) / np.polyval(a[::-1], z_F)
    weighted_NC = np.fft.irfft(np.fft.rfft(samples_NC, size, axis=0) * response_F[:, None], size, axis=0)
    return _lufs(np.square(weighted_NC[: len(samples_NC)]).sum() / len(samples_NC))


def _lufs(power: float) -> float:
    return LUFS_OFFSET + 10 * math.log10(power) if power > 0 else -math.inf
