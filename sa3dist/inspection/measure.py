"""Measure one clip: loudness, peak, silence, clipping, a spectrogram and a fingerprint.

Suffixes: N samples, C channels, P pieces of 100 ms, F bins and S bands of the spectrum.
"""

from __future__ import annotations

import collections
import contextlib
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
    k_energy,
    ungated_loudness,
)

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
# Worked on at one time: 8 MB, 24 s of stereo at 44.1 kHz. With less, threads wait for each other between short calls.
VALUES_AT_ONCE = 1 << 21
# What a clip leaves to the next: fresh memory takes as long as what is done in it.
_SPARE: collections.deque[np.ndarray] = collections.deque()


def measure_clip(data: bytes) -> tuple[AudioFacts, ClipStats]:
    """Decode check and stats of an audio file in one pass. Raises DataError as ``check_audio`` does."""
    measurement = Measurement()
    facts = check_audio(data, measurement)
    return facts, measurement.finish()


class Measurement:
    """Takes a clip block by block, as ``check_audio`` decodes it, in memory that hardly grows with its length."""

    def __init__(self) -> None:
        self._begun = False
        self._powers: list[np.ndarray] = []
        self._peaks: list[np.ndarray] = []
        self._bands: list[np.ndarray] = []
        self._measured = 0
        self._clipped = 0

    def __call__(self, block_NC: np.ndarray, rate_hz: int, expected_samples: int) -> None:
        """Add float32 samples; of more than two channels the first two count, as in training.

        expected_samples   length of the whole clip, which decides the pieces of spectrogram and fingerprint
        """
        if not self._begun:
            self._begin(rate_hz, min(2, block_NC.shape[1]), expected_samples)
        block_NC = block_NC[:, : self._pieces_PCN.shape[1]]
        while len(block_NC):
            block_NC = block_NC[self._take(block_NC) :]
            if self._held == self._room * self._piece:
                self._measure(self._room)
                self._held = 0

    def finish(self) -> ClipStats:
        """The stats. Call once, after the last block."""
        whole, rest = divmod(self._held, self._piece)
        if self._measured + whole < GATING_PIECES:
            # So short a clip is held from its first sample.
            samples_CN = self._pieces_PCN.transpose(1, 0, 2).reshape(self._pieces_PCN.shape[1], -1)
            lufs = ungated_loudness(samples_CN[:, : self._held].T, self._rate)
        if rest:
            self._pieces_PCN[whole, :, rest:] = 0
        if self._held:
            self._measure(whole + (rest > 0))
        powers_P, peaks_P = np.concatenate(self._powers), np.concatenate(self._peaks)
        if rest:
            # A gating block that the clip does not fill has no loudness: the standard leaves it out.
            powers_P = powers_P[:-1]
        if len(powers_P) >= GATING_PIECES:
            lufs = integrated_loudness(powers_P)
        bands_SP = np.ascontiguousarray(np.concatenate(self._bands).T)
        silent_P = peaks_P < SILENCE_PEAK
        sounding = np.flatnonzero(~silent_P)
        first, last = (sounding[0], sounding[-1]) if len(sounding) else (len(silent_P), len(silent_P) - 1)
        peak = float(peaks_P.max())
        _SPARE.append(self._memory)
        return ClipStats(
            lufs=lufs,
            peak_dbfs=20 * math.log10(peak) if peak > 0 else -math.inf,
            silent_share=float(silent_P.mean()),
            lead_seconds=first / PIECES_PER_SECOND,
            tail_seconds=(len(silent_P) - 1 - last) / PIECES_PER_SECOND,
            clipped_samples=self._clipped,
            spectrogram_SP=10 * np.log10(self._of(bands_SP, self._pictured) + 1e-12),
            fingerprint=_fingerprint(self._of(bands_SP, self._compared)),
        )

    def _begin(self, rate_hz: int, channels: int, expected_samples: int) -> None:
        self._begun = True
        self._rate = rate_hz
        self._energy = k_energy(rate_hz)
        self._piece = self._energy.piece
        # Pieces and channels by themselves: what is measured lies in rows then.
        pieces = max(1, -(-expected_samples // self._piece))
        self._pictured, self._compared, self._wanted = _chosen(pieces)
        # As few equal parts as memory allows.
        parts = -(-pieces * channels * self._piece // VALUES_AT_ONCE)
        self._room = max(GATING_PIECES + 1, -(-pieces // parts))
        values = self._room * channels * self._piece
        self._memory = _memory(values + self._energy.values(self._room, channels))
        self._pieces_PCN = self._memory[:values].reshape(self._room, channels, self._piece)
        self._scratch = self._energy.scratch(self._memory[values:], self._room, channels)
        self._held = 0
        self._states_CS = np.zeros((channels, self._energy.states), np.float32)
        self._end_CN = np.zeros((channels, 2), np.float32)

    def _take(self, block_NC: np.ndarray) -> int:
        """Copy what fits: of a piece that was begun its rest, else as many whole pieces as there are, else what is."""
        piece, channels = self._piece, block_NC.shape[1]
        at, begun = divmod(self._held, piece)
        whole = 0 if begun else min(len(block_NC) // piece, self._room - at)
        taken = whole * piece or min(len(block_NC), piece - begun)
        if whole:
            pieces_PNC = block_NC[:taken].reshape(whole, piece, channels)
            self._pieces_PCN[at : at + whole] = pieces_PNC.transpose(0, 2, 1)
        else:
            self._pieces_PCN[at, :, begun : begun + taken] = block_NC[:taken].T
        self._held += taken
        return taken

    def _measure(self, count: int) -> None:
        """Measure the first ``count`` pieces that are held."""
        pieces_PCN = self._pieces_PCN[:count]
        energy_P, self._states_CS = self._energy(pieces_PCN, self._states_CS, self._scratch)
        self._powers.append(energy_P / self._piece)
        flat_PN = pieces_PCN.reshape(count, -1)
        peaks_P = np.maximum(flat_PN.max(axis=1), -flat_PN.min(axis=1))
        self._peaks.append(peaks_P)
        self._clipped += _flat_tops(pieces_PCN, peaks_P, self._end_CN)
        self._end_CN = pieces_PCN[-1, :, -2:].copy()
        first, behind = np.searchsorted(self._wanted, [self._measured, self._measured + count])
        wanted = self._wanted[first:behind]
        if len(wanted):
            self._bands.append(_bands(_mono(pieces_PCN, wanted - self._measured), self._rate))
        self._measured += count

    def _of(self, bands_SP: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        # A clip may be a little shorter than its header says.
        return np.take(bands_SP, np.minimum(np.searchsorted(self._wanted, pieces), bands_SP.shape[1] - 1), axis=1)


def _memory(values: int) -> np.ndarray:
    """float32 (values,) or more, from a clip that is finished where there is one."""
    with contextlib.suppress(IndexError):
        spare = _SPARE.pop()
        if len(spare) >= values:
            return spare
    return np.empty(values, np.float32)


@functools.lru_cache(maxsize=32)
def _chosen(pieces: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of so many pieces those of the picture, those of the fingerprint, and all of them together, in order."""
    pictured, compared = _spread(pieces, min(pieces, PICTURE_PIECES)), _spread(pieces, FINGERPRINT_PIECES)
    return pictured, compared, np.union1d(pictured, compared)


def _spread(pieces: int, count: int) -> np.ndarray:
    return np.linspace(0, pieces - 1, count).round().astype(int)


@functools.lru_cache(maxsize=32)
def _band_edges(piece: int, rate_hz: int) -> np.ndarray:
    return np.searchsorted(np.fft.rfftfreq(piece, 1 / rate_hz), BAND_EDGES_HZ)


@functools.lru_cache(maxsize=32)
def _hann(piece: int) -> np.ndarray:
    return (np.hanning(piece) / piece).astype(np.float32)


def _flat_tops(pieces_PCN: np.ndarray, peaks_P: np.ndarray, before_CN: np.ndarray) -> int:
    """Samples at full scale between two others at full scale; ``before_CN`` are the two in front of the pieces."""
    if peaks_P.max() < FULL_SCALE:
        return 0
    # Only in pieces that reach it, and where two pieces meet.
    ends_PCN = np.concatenate([before_CN[None], pieces_PCN[:-1, :, -2:]])
    seams_PCN = np.concatenate([ends_PCN, pieces_PCN[:, :, :2]], axis=2)
    count = 0
    for samples_PCN in (pieces_PCN[peaks_P >= FULL_SCALE], seams_PCN):
        full_PCN = np.abs(samples_PCN) >= FULL_SCALE
        count += int((full_PCN[..., :-2] & full_PCN[..., 1:-1] & full_PCN[..., 2:]).sum())
    return count


def _mono(pieces_PCN: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    # numpy takes five times as long for the mean of so short an axis.
    mono_PN = pieces_PCN[chosen, 0]
    if pieces_PCN.shape[1] == 2:
        mono_PN += pieces_PCN[chosen, 1]
        mono_PN *= 0.5
    return mono_PN


def _bands(mono_PN: np.ndarray, rate_hz: int) -> np.ndarray:
    """Power in the bands of each piece, float32 (P, S); bands above half the sample rate hold nothing."""
    piece = mono_PN.shape[1]
    mono_PN *= _hann(piece)
    spectrum_PF = torch.fft.rfft(torch.from_numpy(mono_PN)).numpy()
    power_PF = np.zeros((len(mono_PN), spectrum_PF.shape[1] + 1), np.float32)
    np.square(spectrum_PF.real, out=power_PF[:, :-1])
    power_PF[:, :-1] += np.square(spectrum_PF.imag)
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
