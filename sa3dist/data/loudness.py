"""Loudness by ITU-R BS.1770-4: the K-weighted power of pieces of 100 ms, and their gating.

Suffixes: N samples, C channels, M frames of the transform, F bins, P pieces of 100 ms.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

PIECES_PER_SECOND = 10
# BS.1770-4: gating blocks of 400 ms every 100 ms; below -70 LUFS silence; then 10 LU below the mean of the rest.
GATING_PIECES = 4
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
LUFS_OFFSET = -0.691
# The two poles of the high pass at 38 Hz leave 1e-5 of a sample after so long.
MEMORY_SECONDS = 0.05
# So many pieces at one time: fewer transforms to plan; samples and spectra still stay in a core's cache.
PIECES_AT_ONCE = range(12, 18)


def k_weighting(rate_hz: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(b, a) of BS.1770-4's two biquads, shelf and high pass, for any sample rate.

    Source: the standard tabulates 48 kHz only; these are the analogue prototypes of its tables, mapped bilinearly.
    """
    k, q = math.tan(math.pi * 1681.974450955533 / rate_hz), 0.7071752369554196
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
def k_response(rate_hz: int, size: int) -> torch.Tensor:
    """Frequency response of the K weighting at all bins of an FFT of ``size`` samples, divided by it, complex64."""
    z_F = np.exp(-2j * np.pi * np.fft.fftfreq(size))
    response_F = np.ones_like(z_F)
    for b, a in k_weighting(rate_hz):
        response_F *= np.polyval(b[::-1], z_F) / np.polyval(a[::-1], z_F)
    return torch.from_numpy((response_F / size).astype(np.complex64))


class KWeighting:
    """Measures the K-weighted power of consecutive pieces, several at a time.

    piece    samples of 100 ms
    count    pieces of one call
    memory   samples of the past that each call needs in front of its pieces
    length   samples one call looks at: memory, pieces, and whatever lies behind them
    """

    def __init__(self, rate_hz: int, channels: int) -> None:
        """channels: 1 or 2"""
        self.piece = max(1, round(rate_hz / PIECES_PER_SECOND))
        self.memory = round(MEMORY_SECONDS * rate_hz)
        self._channels = channels
        self._size = 1 << (3 * self.memory - 1).bit_length()
        self._hop = self._size - self.memory

        def frames(count: int) -> int:
            return -(-count * self.piece // self._hop)

        # Where the last frame reaches least beyond the last piece.
        self.count = min(PIECES_AT_ONCE, key=lambda count: frames(count) / count)
        self._frames = frames(self.count)
        self.length = self.memory + self._frames * self._hop
        # Two channels are filtered as one complex signal: the response of a real filter keeps them apart.
        response_F = k_response(rate_hz, self._size)
        self._response_F = response_F if channels == 2 else response_F[: self._size // 2 + 1]
        # Used again and again: fresh memory costs more than transforming what is in it.
        self._spectrum_MF = torch.empty((self._frames, len(self._response_F)), dtype=torch.complex64)
        weighted_dtype = torch.complex64 if channels == 2 else torch.float32
        self._weighted_MN = torch.empty((self._frames, self._size), dtype=weighted_dtype)
        self._joined = np.empty((self._frames, self._hop * channels), np.float32)

    def powers(self, samples_NC: np.ndarray, end: int) -> np.ndarray:
        """Weighted mean squares, summed over channels, of the pieces that begin before ``end``: float32.

        samples_NC   float32 (length, channels), contiguous: memory, pieces, and anything behind them
        end          samples of the pieces that count; of the last of them it may be a part only

        The filters by their frequency response, in frames that overlap by their memory (overlap-save).
        """
        samples = torch.from_numpy(samples_NC.reshape(-1))
        if self._channels == 2:
            samples = torch.view_as_complex(samples.view(-1, 2))
        frames_MN = samples.unfold(0, self._size, self._hop)
        forward, back = (torch.fft.fft, torch.fft.ifft) if self._channels == 2 else (torch.fft.rfft, torch.fft.irfft)
        spectrum_MF = forward(frames_MN, out=self._spectrum_MF).mul_(self._response_F)
        # "forward": the response has been divided by the size already, which spares a pass.
        weighted_MN = back(spectrum_MF, self._size, norm="forward", out=self._weighted_MN)
        weighted = weighted_MN.view(torch.float32).numpy()
        np.square(weighted[:, self.memory * self._channels :], out=self._joined)
        begins = np.arange(0, end, self.piece)
        sums_P = np.add.reduceat(self._joined.reshape(-1)[: end * self._channels], begins * self._channels)
        return sums_P / np.minimum(self.piece, end - begins)


def integrated_loudness(powers_P: np.ndarray) -> float:
    """LUFS of K-weighted mean squares, summed over channels, of consecutive 100 ms pieces (BS.1770-4, annex 1)."""
    if len(powers_P) < GATING_PIECES:
        return _lufs(powers_P.mean())
    blocks = np.lib.stride_tricks.sliding_window_view(powers_P, GATING_PIECES).mean(axis=1)
    blocks = blocks[blocks > 10 ** ((ABSOLUTE_GATE_LUFS - LUFS_OFFSET) / 10)]
    if len(blocks) == 0:
        return -math.inf
    return _lufs(blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE_LU / 10)].mean())


def _lufs(power: float) -> float:
    return LUFS_OFFSET + 10 * math.log10(power) if power > 0 else -math.inf
