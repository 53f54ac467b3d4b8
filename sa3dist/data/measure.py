"""What one clip sounds like in figures: loudness, peak, silence, clipping, a spectrogram and a fingerprint.

Suffixes: N samples, C channels, P pieces of 100 ms, S bands of the spectrum.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch

from sa3dist.data.audio import SILENCE_PEAK

PIECES_PER_SECOND = 10
# BS.1770-4: gating blocks of 400 ms every 100 ms; below -70 LUFS silence; then 10 LU below the mean of the rest.
GATING_PIECES = 4
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
LUFS_OFFSET = -0.691
# A 16-bit file clips at 32767/32768; three neighbours there are a flat top, one alone is a peak that fits.
FULL_SCALE = 32766.5 / 32768
BANDS = 64
BAND_EDGES_HZ = np.geomspace(40.0, 16000.0, BANDS + 1)
# Lossy codecs cut above this, and 22 kHz copies end at 11 kHz.
FINGERPRINT_TOP_HZ = 8000.0
FINGERPRINT_PIECES = 24
# How far below a clip's loudest band the fingerprint looks: quieter parts are codec noise.
FINGERPRINT_RANGE_DB = 50.0


@dataclasses.dataclass(frozen=True)
class ClipFigures:
    """lufs            integrated loudness (ITU-R BS.1770-4), -inf when all of it is gated away; ungated below 400 ms
    peak_dbfs       largest sample, dB full scale
    silent_share    share of 100 ms pieces that stay below -60 dBFS, training's own limit
    lead_seconds, tail_seconds   silence before and after the sound
    clipped_samples   samples at full scale between two others at full scale
    spectrogram_SP  float32 dB, 64 bands from 40 Hz to 16 kHz by 100 ms
    fingerprint     float32: level-free picture of the spectrum over time, compare with ``fingerprint_distance_db``
    """

    lufs: float
    peak_dbfs: float
    silent_share: float
    lead_seconds: float
    tail_seconds: float
    clipped_samples: int
    spectrogram_SP: np.ndarray
    fingerprint: np.ndarray


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
    """Frequency response of the K weighting at the bins of a real FFT of ``size`` samples, complex64."""
    z_F = np.exp(-2j * np.pi * np.fft.rfftfreq(size))
    response_F = np.ones_like(z_F)
    for b, a in k_weighting(rate_hz):
        response_F *= np.polyval(b[::-1], z_F) / np.polyval(a[::-1], z_F)
    return torch.from_numpy(response_F.astype(np.complex64))


class Measurement:
    """Takes a clip block by block, as ``check_audio`` decodes it, in memory that grows by 256 bytes per 100 ms."""

    def __init__(self) -> None:
        self._rate = 0
        self._pending_CN = np.zeros((1, 0), np.float32)
        self._history_CN = np.zeros((1, 0), np.float32)
        self._powers: list[np.ndarray] = []
        self._peaks: list[np.ndarray] = []
        self._bands: list[np.ndarray] = []
        self._clipped = 0

    def __call__(self, block_NC: np.ndarray, rate_hz: int) -> None:
        """Add float32 samples; of more than two channels the first two count, as in training."""
        # Channel by channel from here on: every pass below then runs along memory.
        block_CN = np.ascontiguousarray(block_NC[:, :2].T)
        if not self._rate:
            self._rate = rate_hz
            self._piece = max(1, round(rate_hz / PIECES_PER_SECOND))
            self._window_N = np.hanning(self._piece).astype(np.float32) / self._piece
            self._history_CN = np.zeros((len(block_CN), self._piece), np.float32)
            self._pending_CN = block_CN[:, :0]
            edges = np.searchsorted(np.fft.rfftfreq(self._piece, 1 / rate_hz), BAND_EDGES_HZ)
            # Low bands may be narrower than a bin: each holds one at least.
            self._last = np.minimum(np.maximum(edges[1:], edges[:-1] + 1), self._piece // 2 + 1)
            self._first = np.minimum(edges[:-1], self._last)
        if max(block_CN.max(), -block_CN.min()) >= FULL_SCALE:
            full_CN = np.abs(block_CN) >= FULL_SCALE
            self._clipped += int((full_CN[:, :-2] & full_CN[:, 1:-1] & full_CN[:, 2:]).sum())
        joined_CN = np.concatenate([self._pending_CN, block_CN], axis=1)
        whole = joined_CN.shape[1] // self._piece * self._piece
        self._pending_CN = joined_CN[:, whole:]
        if whole:
            self._add(joined_CN[:, :whole])

    def finish(self) -> ClipFigures:
        """The figures. Call once, after the last block."""
        short = self._pending_CN.shape[1]
        if short:
            self._add(np.pad(self._pending_CN, ((0, 0), (0, self._piece - short))))
            # The padding is no part of the sound.
            self._powers[-1] *= self._piece / short
        powers_P, peaks_P = np.concatenate(self._powers), np.concatenate(self._peaks)
        bands_SP = np.concatenate(self._bands).T
        silent_P = peaks_P < SILENCE_PEAK
        sounding = np.flatnonzero(~silent_P)
        first, last = (sounding[0], sounding[-1]) if len(sounding) else (len(silent_P), len(silent_P) - 1)
        peak = float(peaks_P.max())
        return ClipFigures(
            lufs=integrated_loudness(powers_P),
            peak_dbfs=20 * math.log10(peak) if peak > 0 else -math.inf,
            silent_share=float(silent_P.mean()),
            lead_seconds=first / PIECES_PER_SECOND,
            tail_seconds=(len(silent_P) - 1 - last) / PIECES_PER_SECOND,
            clipped_samples=self._clipped,
            spectrogram_SP=10 * np.log10(bands_SP + 1e-12),
            fingerprint=_fingerprint(bands_SP),
        )

    def _add(self, samples_CN: np.ndarray) -> None:
        pieces_CPN = samples_CN.reshape(len(samples_CN), -1, self._piece)
        self._peaks.append(np.maximum(pieces_CPN.max(axis=2), -pieces_CPN.min(axis=2)).max(axis=0))
        weighted_CPN = self._weighted(samples_CN).reshape(pieces_CPN.shape)
        self._powers.append(np.einsum("cpn,cpn->p", weighted_CPN, weighted_CPN) / self._piece)
        mono_PN = pieces_CPN[0] if len(pieces_CPN) == 1 else (pieces_CPN[0] + pieces_CPN[1]) / 2
        power_PF = torch.fft.rfft(torch.from_numpy(mono_PN * self._window_N)).abs().square_().numpy()
        summed_PF = np.pad(np.cumsum(power_PF, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
        self._bands.append((summed_PF[:, self._last] - summed_PF[:, self._first]).clip(0).astype(np.float32))

    def _weighted(self, samples_CN: np.ndarray) -> np.ndarray:
        """K-weighted samples, float32: the filters by their frequency response, in blocks that overlap by a piece.

        The filters' memory is below 1e-9 after the 100 ms that every block has in front, and that are cut off again.
        """
        channels, length = samples_CN.shape
        size = 1 << (4 * self._piece - 1).bit_length()
        hop = size - self._piece
        blocks = -(-length // hop)
        joined_CN = np.concatenate(
            [self._history_CN, samples_CN, np.zeros((channels, blocks * hop - length), np.float32)], axis=1
        )
        self._history_CN = joined_CN[:, length : length + self._piece].copy()
        # torch's transforms take two thirds of the time of numpy's.
        spectrum_CBF = torch.fft.rfft(torch.from_numpy(joined_CN).unfold(1, size, hop))
        weighted_CBN = torch.fft.irfft(spectrum_CBF.mul_(k_response(self._rate, size)), size)
        return weighted_CBN[:, :, self._piece :].reshape(channels, -1)[:, :length].numpy()


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


def _fingerprint(bands_SP: np.ndarray) -> np.ndarray:
    top = int(np.searchsorted(BAND_EDGES_HZ, FINGERPRINT_TOP_HZ)) - 1
    moments = np.linspace(0, bands_SP.shape[1] - 1, FINGERPRINT_PIECES).round().astype(int)
    # Pairs of bands, so that a codec's rounding of a narrow one does not count.
    picked = bands_SP[: top - top % 2, moments].reshape(-1, 2, FINGERPRINT_PIECES).sum(axis=1)
    decibels = 10 * np.log10(picked + 1e-12)
    decibels = np.maximum(decibels, decibels.max() - FINGERPRINT_RANGE_DB)
    return (decibels - decibels.mean()).astype(np.float32).ravel()


def fingerprint_distance_db(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two fingerprints in dB; 0 for copies at another level, rate or channel count."""
    return float(np.sqrt(np.mean((one - other) ** 2)))
