"""What one clip sounds like in figures: loudness, peak, silence, clipping, a spectrogram and a fingerprint.

Suffixes: N samples, C channels, P pieces of 100 ms, F bins and S bands of the spectrum.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from sa3dist.data.audio import SILENCE_PEAK
from sa3dist.data.figures import ClipFigures
from sa3dist.data.loudness import PIECES_PER_SECOND, KWeighting, integrated_loudness

# A 16-bit file clips at 32767/32768; three neighbours there are a flat top, one alone is a peak that fits.
FULL_SCALE = 32766.5 / 32768
BANDS = 64
BAND_EDGES_HZ = np.geomspace(40.0, 16000.0, BANDS + 1)
# Lossy codecs cut above this, and 22 kHz copies end at 11 kHz.
FINGERPRINT_TOP_HZ = 8000.0
FINGERPRINT_PIECES = 24
# How far below a clip's loudest band the fingerprint looks: quieter parts are codec noise.
FINGERPRINT_RANGE_DB = 50.0
# As many pieces of a clip as its picture shows: those of the fingerprint, and one between each two.
PICTURE_PIECES = 2 * FINGERPRINT_PIECES - 1


class Measurement:
    """Takes a clip block by block, as ``check_audio`` decodes it, in memory that hardly grows with its length."""

    def __init__(self) -> None:
        self._begun = False
        self._powers: list[np.ndarray] = []
        self._peaks: list[np.ndarray] = []
        self._bands: dict[int, np.ndarray] = {}
        self._measured = 0
        self._clipped = 0

    def __call__(self, block_NC: np.ndarray, rate_hz: int, expected_samples: int) -> None:
        """Add float32 samples; of more than two channels the first two count, as in training.

        expected_samples   length of the whole clip, which decides the pieces of spectrogram and fingerprint
        """
        if not self._begun:
            self._begin(rate_hz, min(2, block_NC.shape[1]), expected_samples)
        block_NC = block_NC[:, : self._samples_NC.shape[1]]
        if max(block_NC.max(), -block_NC.min()) >= FULL_SCALE:
            full_NC = np.abs(block_NC) >= FULL_SCALE
            self._clipped += int((full_NC[:-2] & full_NC[1:-1] & full_NC[2:]).sum())
        while len(block_NC):
            taken = min(len(block_NC), self._full - self._held)
            self._samples_NC[self._held : self._held + taken] = block_NC[:taken]
            self._held += taken
            block_NC = block_NC[taken:]
            if self._held == self._full:
                self._measure(self._full - self._weighting.memory)

    def finish(self) -> ClipFigures:
        """The figures. Call once, after the last block."""
        if self._held > self._weighting.memory:
            self._measure(self._held - self._weighting.memory)
        powers_P, peaks_P = np.concatenate(self._powers), np.concatenate(self._peaks)
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
            spectrogram_SP=10 * np.log10(self._bands_of(self._pictured) + 1e-12),
            fingerprint=_fingerprint(self._bands_of(self._compared)),
        )

    def _begin(self, rate_hz: int, channels: int, expected_samples: int) -> None:
        self._begun = True
        self._rate = rate_hz
        self._weighting = weighting = KWeighting(rate_hz, channels)
        # The past that the weighting needs, then what comes in.
        self._samples_NC = np.zeros((weighting.length, channels), np.float32)
        self._held = weighting.memory
        self._full = weighting.memory + weighting.count * weighting.piece
        pieces = max(1, -(-expected_samples // weighting.piece))
        self._pictured = _spread(pieces, min(pieces, PICTURE_PIECES))
        self._compared = _spread(pieces, FINGERPRINT_PIECES)
        self._wanted = np.union1d(self._pictured, self._compared)

    def _measure(self, end: int) -> None:
        """Measure the ``end`` samples that are held, and keep of them what the next ones need."""
        piece, memory = self._weighting.piece, self._weighting.memory
        self._powers.append(self._weighting.powers(self._samples_NC, end))
        count = -(-end // piece)
        self._samples_NC[memory + end : memory + count * piece] = 0
        pieces_PNC = self._samples_NC[memory : memory + count * piece].reshape(count, piece, -1)
        flat_PN = pieces_PNC.reshape(count, -1)
        self._peaks.append(np.maximum(flat_PN.max(axis=1), -flat_PN.min(axis=1)))
        first, behind = np.searchsorted(self._wanted, [self._measured, self._measured + count])
        wanted = self._wanted[first:behind]
        if len(wanted):
            bands_PS = _bands(_mono(pieces_PNC[wanted - self._measured]), self._rate)
            self._bands.update(zip(wanted.tolist(), bands_PS, strict=True))
        self._samples_NC[:memory] = self._samples_NC[end : end + memory]
        self._held = memory
        self._measured += count

    def _bands_of(self, pieces: np.ndarray) -> np.ndarray:
        # A clip may be a little shorter than its header says.
        last = max(self._bands)
        return np.stack([self._bands[min(piece, last)] for piece in pieces.tolist()], axis=1)


def _spread(pieces: int, count: int) -> np.ndarray:
    return np.linspace(0, pieces - 1, count).round().astype(int)


@functools.lru_cache(maxsize=32)
def _band_edges(piece: int, rate_hz: int) -> np.ndarray:
    return np.searchsorted(np.fft.rfftfreq(piece, 1 / rate_hz), BAND_EDGES_HZ)


@functools.lru_cache(maxsize=32)
def _hann(piece: int) -> np.ndarray:
    return (np.hanning(piece) / piece).astype(np.float32)


def _mono(pieces_PNC: np.ndarray) -> np.ndarray:
    # numpy takes thirty times as long for the mean of so short an axis.
    return pieces_PNC[..., 0].copy() if pieces_PNC.shape[2] == 1 else (pieces_PNC[..., 0] + pieces_PNC[..., 1]) / 2


def _bands(mono_PN: np.ndarray, rate_hz: int) -> np.ndarray:
    """Power in the bands of each piece, float32 (P, S); bands above half the sample rate hold nothing."""
    piece = mono_PN.shape[1]
    mono_PN *= _hann(piece)
    spectrum_PF2 = torch.view_as_real(torch.fft.rfft(torch.from_numpy(mono_PN))).numpy()
    np.square(spectrum_PF2, out=spectrum_PF2)
    power_PF = np.zeros((len(mono_PN), spectrum_PF2.shape[1] + 1), np.float32)
    np.add(spectrum_PF2[..., 0], spectrum_PF2[..., 1], out=power_PF[:, :-1])
    # Where low bands are narrower than a bin, reduceat gives the one bin that begins them.
    return np.add.reduceat(power_PF, _band_edges(piece, rate_hz), axis=1)[:, :-1]


def _fingerprint(bands_SP: np.ndarray) -> np.ndarray:
    top = int(np.searchsorted(BAND_EDGES_HZ, FINGERPRINT_TOP_HZ)) - 1
    # Pairs of bands, so that a codec's rounding of a narrow one does not count.
    paired = bands_SP[: top - top % 2].reshape(-1, 2, FINGERPRINT_PIECES).sum(axis=1)
    decibels = 10 * np.log10(paired + 1e-12)
    decibels = np.maximum(decibels, decibels.max() - FINGERPRINT_RANGE_DB)
    return (decibels - decibels.mean()).astype(np.float32).ravel()


def fingerprint_distance_db(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two fingerprints in dB; 0 for copies at another level, rate or channel count."""
    return float(np.sqrt(np.mean((one - other) ** 2)))
