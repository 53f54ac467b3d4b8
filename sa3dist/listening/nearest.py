"""Find where a piece of sound occurs in clips: correlate its windows with every position of every clip.

Frames are log-mel bands or latents, one column per latent frame. Windows are centred before correlation, so that a
change of level, which shifts all bands of a log spectrum equally, does not count.

Legend: D bands or channels, T frames of a clip, W frames of a window, Q windows, S segments of a clip, F frequencies.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

# Long enough that unrelated sounds hardly agree, short enough to find a copied part of a preview.
WINDOW_SECONDS = 4.0
# Of the log-mel spectrum. Lossy codecs change what is higher, or quieter, than this.
BANDS, LOWEST_HZ, TOP_HZ = 32, 60.0, 8000.0
RANGE_DB = 45.0
# Frames transformed at a time: 95 s at 10.8 frames per second.
SEGMENT = 1024
# A window whose values spread less than this share of the whole piece's has nothing to recognise.
LEAST_SPREAD = 0.05


@dataclasses.dataclass(frozen=True)
class Match:
    """The best match of a piece.

    distance   1 - correlation: 0 for equal windows, 1 for unrelated ones
    clip       key of the clip; empty if nothing could be compared
    frame      start of the matching window in the clip
    """

    distance: float = 1.0
    clip: str = ""
    frame: float = 0.0


def mel_frames(audio_CN: np.ndarray, rate: int, hop: int, offset: int = 0) -> np.ndarray:
    """Levels in dB, float32 (BANDS, T): frame t covers the two hops around sample ``offset + (t + 1/2) hop``.

    Levels far more than RANGE_DB below the clip's loudest band are raised to about that. Uses numpy, whose transforms
    take no threads from the training.
    """
    mono = audio_CN.mean(axis=0)[offset:]
    frames = max(1, -(-len(mono) // hop))
    padded = np.zeros((frames + 1) * hop, np.float32)
    padded[hop // 2 : hop // 2 + len(mono)] = mono
    windows_TN = np.lib.stride_tricks.sliding_window_view(padded, 2 * hop)[::hop]
    hann, banks_FD = np.hanning(2 * hop).astype(np.float32), _banks(hop + 1, rate)
    levels_TD = np.empty((frames, BANDS), np.float32)
    # A few seconds at a time fit into a core's cache.
    for begin in range(0, frames, 64):
        spectrum_TF = np.fft.rfft(windows_TN[begin : begin + 64] * hann)
        levels_TD[begin : begin + 64] = np.square(np.abs(spectrum_TF)).astype(np.float32) @ banks_FD
    # A soft floor: at a hard one the noise of a codec would decide.
    return 10 * np.log10(levels_TD + max(float(levels_TD.max()) * 10 ** (-RANGE_DB / 10), 1e-10)).T


@functools.lru_cache(maxsize=4)
def _banks(bins: int, rate: int) -> np.ndarray:
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(bins, LOWEST_HZ, min(TOP_HZ, rate / 2), BANDS, rate, mel_scale="slaney").numpy()


def without_silence(frames_DT: np.ndarray, sounds_T: np.ndarray) -> np.ndarray:
    """Zeros where nothing sounds: all silence is equal, and never a copy."""
    return np.where(sounds_T, frames_DT, np.float32(0))


def windows_of(variants: Sequence[np.ndarray], window: int) -> np.ndarray:
    """Consecutive windows of every variant (D, T) of a sound: shifted by parts of a frame, or flipped.

    float32 (Q, D, window), centred, of unit norm, without windows that have nothing to recognise.
    """
    windows = []
    spread = max(float(np.std(frames_DT)) for frames_DT in variants)
    for frames_DT in variants:
        # Continue a short sound like the clips it is compared with.
        frames_DT = np.pad(frames_DT, ((0, 0), (0, max(0, window - frames_DT.shape[1]))), mode="edge")
        last = frames_DT.shape[1] - window
        for begin in sorted({*range(0, last + 1, window), last}):
            centred_DW = frames_DT[:, begin : begin + window] - frames_DT[:, begin : begin + window].mean()
            if (norm := np.linalg.norm(centred_DW)) > LEAST_SPREAD * spread * centred_DW.size**0.5 and norm > 0:
                windows.append(centred_DW / norm)
    return np.array(windows, np.float32).reshape(-1, len(variants[0]), window)


def nearest(pieces: Sequence[np.ndarray], clips: Iterable[tuple[str, np.ndarray]]) -> list[Match]:
    """The best match of each piece, given as its ``windows_of``, in all clips, given as (key, frames (D, T))."""
    best = [Match() for _ in pieces]
    if not sum(map(len, pieces)):
        return best
    bank = _Bank(np.concatenate(pieces))
    owners = np.concatenate([np.full(len(piece), number) for number, piece in enumerate(pieces)])
    for key, frames_DT in clips:
        values_Q, positions_Q = bank.best(frames_DT)
        for number in range(len(pieces)):
            mine = np.flatnonzero(owners == number)
            if len(mine):
                top = mine[values_Q[mine].argmax()]
                if 1 - values_Q[top] < best[number].distance:
                    best[number] = Match(float(1 - values_Q[top]), key, float(positions_Q[top]))
    return best


class _Bank:
    """Windows prepared for correlation: transformed once, for segments of one length."""

    def __init__(self, windows_QDW: np.ndarray) -> None:
        self.count, self.channels, self.window = windows_QDW.shape
        self.size = max(SEGMENT, 1 << (2 * self.window).bit_length())
        spectra_QDF = np.fft.rfft(windows_QDW, self.size).conj().astype(np.complex64)
        self.spectra_FQD = np.ascontiguousarray(spectra_QDF.transpose(2, 0, 1))

    def best(self, frames_DT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best correlation of every window, and the frame of the clip where the matching window begins.

        A clip shorter than one and a half windows is continued by repeating its last frame.
        """
        length = frames_DT.shape[1]
        frames_DT = np.pad(frames_DT, ((0, 0), (0, max(self.window - length, 0) + self.window // 2)), mode="edge")
        positions = frames_DT.shape[1] - self.window + 1
        inverse_P = self._inverse_norms(frames_DT)
        # Segments overlap by a window: in each, the first ``step`` positions are free of wrap-around.
        step = self.size - self.window + 1
        segments_SD = np.zeros((-(-positions // step), self.channels, self.size), np.float32)
        for number, segment_D in enumerate(segments_SD):
            part = frames_DT[:, number * step : number * step + self.size]
            segment_D[:, : part.shape[1]] = part
        spectra_FDS = np.fft.rfft(segments_SD).astype(np.complex64).transpose(2, 1, 0)
        products_QSN = np.fft.irfft((self.spectra_FQD @ spectra_FDS).transpose(1, 2, 0), self.size)[:, :, :step]
        values_QP = products_QSN.reshape(self.count, -1)[:, :positions] * inverse_P
        positions_Q = values_QP.argmax(axis=1)
        return values_QP[np.arange(self.count), positions_Q], positions_Q

    def _inverse_norms(self, frames_DT: np.ndarray) -> np.ndarray:
        """1 over the norm of every centred window of a clip; 0 where it has nothing to recognise."""
        sums, squares = (np.concatenate([[0.0], np.cumsum(value)]) for value in _column_sums(frames_DT))
        sum_P, square_P = (value[self.window :] - value[: -self.window] for value in (sums, squares))
        size = self.channels * self.window
        energy_P = square_P - sum_P**2 / size
        least = LEAST_SPREAD**2 * float(np.var(frames_DT, dtype=np.float64)) * size
        return np.where(energy_P > max(least, 1e-9), 1 / np.sqrt(np.maximum(energy_P, 1e-9)), 0.0).astype(np.float32)


def _column_sums(frames_DT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide_DT = frames_DT.astype(np.float64)
    return wide_DT.sum(axis=0), np.square(wide_DT).sum(axis=0)
