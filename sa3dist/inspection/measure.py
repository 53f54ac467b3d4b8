"""Measure one clip: loudness, peak, silence, clipping, a spectrogram and a fingerprint.

Suffixes: N samples, C channels, P pieces of 100 ms, F bins and S bands of the spectrum.
"""

import functools
import math

import numpy as np
import torch

from sa3dist.data.source.audio import AudioFacts, check_audio
from sa3dist.data.source.clip_stats import ClipStats
from sa3dist.flow.crops import SILENCE_PEAK
from sa3dist.inspection.loudness import (
    GATING_PIECES,
    PIECES_PER_SECOND,
    integrated_loudness,
    k_weighted,
    lufs_of,
)

# A 16-bit file clips at 32767/32768. Three consecutive samples there are clipping; a single one is a normal peak.
FULL_SCALE = 32766.5 / 32768
BANDS = 64
BAND_EDGES_HZ = np.geomspace(40.0, 16000.0, BANDS + 1)
# Lossy codecs cut higher frequencies, and copies at 22 kHz end at 11 kHz.
FINGERPRINT_TOP_HZ = 8000.0
FINGERPRINT_PIECES = 24
# Range of the fingerprint below the loudest band; quieter parts are codec noise.
FINGERPRINT_RANGE_DB = 50.0
# Columns of a clip's picture: the pieces of the fingerprint, and one between each two.
PICTURE_PIECES = 2 * FINGERPRINT_PIECES - 1
# Pieces measured at a time, after the previous piece: 3.2 s in total, 1.1 MB for stereo at 44.1 kHz.
PIECES_AT_ONCE = 31


def measure_clip(data: bytes) -> tuple[AudioFacts, ClipStats]:
    """Decode check and statistics of an audio file, in one pass. Raises DataError like ``check_audio``."""
    measurement = Measurement()
    return check_audio(data, measurement), measurement.finish()


class Measurement:
    """Measures a clip block by block, as decoded by ``check_audio``, in nearly constant memory."""

    def __init__(self) -> None:
        self._buffer_CN: np.ndarray | None = None
        self._powers: list[np.ndarray] = []
        self._peaks: list[np.ndarray] = []
        self._bands: list[np.ndarray] = []
        self._clipped = 0

    def __call__(self, block_NC: np.ndarray, rate_hz: int) -> None:
        """Add float32 samples; at most the first two channels are used, as in training."""
        block_CN = block_NC[:, :2].T
        if self._buffer_CN is None:
            self._rate, self._piece = rate_hz, round(rate_hz / PIECES_PER_SECOND)
            self._buffer_CN = np.zeros((len(block_CN), (1 + PIECES_AT_ONCE) * self._piece), np.float32)
            self._end = self._piece
        while block_CN.shape[1]:
            room_CN = self._buffer_CN[:, self._end :][:, : block_CN.shape[1]]
            taken = room_CN.shape[1]
            room_CN[:] = block_CN[:, :taken]
            self._end += taken
            block_CN = block_CN[:, taken:]
            if self._end == self._buffer_CN.shape[1]:
                self._measure()

    def finish(self) -> ClipStats:
        """The statistics. Call once, after the last block."""
        if self._end > self._piece:
            self._measure()
        powers_P, peaks_P = np.concatenate(self._powers), np.concatenate(self._peaks)
        # A clip shorter than a gating block has been measured in a single call, so _mean_power covers all of it.
        lufs = integrated_loudness(powers_P) if len(powers_P) >= GATING_PIECES else lufs_of(self._mean_power)
        bands_SP = np.concatenate(self._bands).T
        silent_P = peaks_P < SILENCE_PEAK
        pieces = len(silent_P)
        sounding = np.flatnonzero(~silent_P)
        first, last = (sounding[0], sounding[-1]) if len(sounding) else (pieces, pieces - 1)
        peak = float(peaks_P.max())
        return ClipStats(
            lufs=lufs,
            peak_dbfs=20 * math.log10(peak) if peak > 0 else -math.inf,
            silent_share=float(silent_P.mean()),
            lead_seconds=first / PIECES_PER_SECOND,
            tail_seconds=(pieces - 1 - last) / PIECES_PER_SECOND,
            clipped_samples=self._clipped,
            spectrogram_SP=10 * np.log10(_spread(bands_SP, min(pieces, PICTURE_PIECES)) + 1e-12),
            fingerprint=_fingerprint(_spread(bands_SP, FINGERPRINT_PIECES)),
        )

    def _measure(self) -> None:
        """Measure the buffered pieces; then move the last one to the front, before the next ones."""
        piece, samples = self._piece, self._end - self._piece
        whole, pieces = samples // piece, -(-samples // piece)
        self._buffer_CN[:, self._end :] = 0
        squares_N = np.square(k_weighted(self._buffer_CN, self._rate)[:, piece : self._end]).sum(axis=0)
        # Only complete pieces: the standard leaves out incomplete gating blocks.
        self._powers.append(squares_N[: whole * piece].reshape(whole, piece).mean(axis=1))
        self._mean_power = float(squares_N.mean())
        new_CPN = self._buffer_CN[:, piece : (1 + pieces) * piece].reshape(-1, pieces, piece)
        self._peaks.append(np.abs(new_CPN).max(axis=(0, 2)))
        self._bands.append(_bands(new_CPN.mean(axis=0), self._rate))
        if self._peaks[-1].max() >= FULL_SCALE:
            # Samples at full scale between two others at full scale, including across pieces.
            full_CN = np.abs(self._buffer_CN[:, piece - 2 : self._end]) >= FULL_SCALE
            self._clipped += int((full_CN[:, :-2] & full_CN[:, 1:-1] & full_CN[:, 2:]).sum())
        self._buffer_CN[:, :piece] = self._buffer_CN[:, self._end - piece : self._end]
        self._end = piece


def _spread(bands_SP: np.ndarray, count: int) -> np.ndarray:
    """``count`` evenly spaced pieces; some are repeated if there are fewer."""
    return np.take(bands_SP, np.linspace(0, bands_SP.shape[1] - 1, count).round().astype(int), axis=1)


@functools.lru_cache(maxsize=32)
def _band_edges(piece: int, rate_hz: int) -> np.ndarray:
    return np.searchsorted(np.fft.rfftfreq(piece, 1 / rate_hz), BAND_EDGES_HZ)


@functools.lru_cache(maxsize=32)
def _hann(piece: int) -> np.ndarray:
    return (np.hanning(piece) / piece).astype(np.float32)


def _bands(mono_PN: np.ndarray, rate_hz: int) -> np.ndarray:
    """Power in the bands of each piece, float32 (P, S); bands above half the sample rate are empty."""
    piece = mono_PN.shape[1]
    mono_PN *= _hann(piece)
    spectrum_PF = torch.fft.rfft(torch.from_numpy(mono_PN)).numpy()
    power_PF = np.zeros((len(mono_PN), spectrum_PF.shape[1] + 1), np.float32)
    np.square(spectrum_PF.real, out=power_PF[:, :-1])
    power_PF[:, :-1] += np.square(spectrum_PF.imag)
    # For a band narrower than a bin, reduceat returns the bin at its lower edge.
    return np.add.reduceat(power_PF, _band_edges(piece, rate_hz), axis=1)[:, :-1]


def _fingerprint(bands_SP: np.ndarray) -> np.ndarray:
    top = int(np.searchsorted(BAND_EDGES_HZ, FINGERPRINT_TOP_HZ)) - 1
    # Sum pairs of bands, to reduce the effect of a codec's rounding in narrow ones.
    paired = bands_SP[: top - top % 2].reshape(-1, 2, FINGERPRINT_PIECES).sum(axis=1)
    decibels = 10 * np.log10(paired + 1e-12)
    decibels = np.maximum(decibels, decibels.max() - FINGERPRINT_RANGE_DB)
    return (decibels - decibels.mean()).astype(np.float32).ravel()


def fingerprint_distance_db(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two fingerprints in dB; 0 for copies at another level, rate or channel count."""
    return float(np.sqrt(np.mean((one - other) ** 2)))
