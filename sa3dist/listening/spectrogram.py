"""A clip's spectrogram as a PNG file: time to the right, pitch upwards, level as colour.

Legend: C audio channels, N samples, M bands of pitch, P pieces of time.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sa3dist.formats import write_whole
from sa3dist.inspection.png import png

# With 4096 samples the lowest bands are resolved, and with 128 bands each has at least one line of the spectrum.
WINDOW, BANDS, LOWEST_HZ = 4096, 128, 30.0
# Size in pixels; bands are drawn twice, one above the other.
WIDEST, POINTS_PER_BAND = 1000, 2
# dB full scale of the darkest colour; the brightest is a full-scale sine.
FLOOR_DB = -90.0
# Colours from silent to loud, red, green and blue, interpolated between.
COLOURS = ((0, 0, 4), (60, 15, 110), (150, 40, 120), (235, 90, 60), (250, 180, 60), (252, 253, 191))


def levels(audio_CN: Tensor, rate: int) -> Tensor:
    """Level of every band in every piece, float32 dB (M, P): 0 is a full-scale sine, FLOOR_DB the minimum."""
    from torchaudio.functional import melscale_fbanks

    mono = audio_CN.float().mean(0)
    hop = max(WINDOW // 32, math.ceil(len(mono) / (WIDEST - 1)))
    window = torch.hann_window(WINDOW)
    spectrum_FP = torch.stft(mono, WINDOW, hop, window=window, pad_mode="constant", return_complex=True)
    power_FP = (spectrum_FP.abs() / (window.sum() / 2)).square()
    banks_FM = melscale_fbanks(len(power_FP), LOWEST_HZ, rate / 2, BANDS, rate, mel_scale="slaney")
    return (10 * torch.log10(banks_FM.T @ power_FP + 1e-12)).clamp(min=FLOOR_DB)


def write_spectrogram(path: Path, audio_CN: Tensor, rate: int) -> None:
    """Write the picture of a clip, atomically."""
    shades_MP = (255 * (1 - levels(audio_CN, rate).clamp(max=0) / FLOOR_DB)).round().to(torch.uint8).flip(0)
    steps = np.linspace(0, len(COLOURS) - 1, 256)
    palette = np.stack([np.interp(steps, range(len(COLOURS)), part) for part in zip(*COLOURS, strict=True)], axis=1)
    picture = shades_MP.repeat_interleave(POINTS_PER_BAND, dim=0).numpy()
    write_whole(path, png(picture, palette.round().astype(np.uint8)))
