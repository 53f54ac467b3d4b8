"""The picture of a clip: tones stand where their pitch is, at their level, in a PNG that holds together."""

import math
import struct
import zlib

import pytest
import torch

from sa3dist.listening.spectrogram import BANDS, COLOURS, FLOOR_DB, POINTS_PER_BAND, WIDEST, levels, write_spectrogram

RATE = 44100


def tone(hertz, seconds, level=1.0):
    wave = level * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * RATE)) / RATE)
    return torch.stack([wave, wave])


def pixels(data):
    """(shades, palette) of an 8-bit palette PNG without filters, its checksums verified."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    parts, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + body)
        parts[name], at = body, at + 12 + size
    width, height, depth, kind, *rest = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert (depth, kind, rest) == (8, 3, [0, 0, 0])
    assert b"IEND" in parts
    rows = torch.frombuffer(bytearray(zlib.decompress(parts[b"IDAT"])), dtype=torch.uint8).view(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:], parts[b"PLTE"]


@pytest.mark.parametrize("hertz", [60, 440, 1000, 9000])
def test_a_tone_is_loudest_in_the_band_of_its_pitch_at_its_level(hertz):
    from torchaudio.functional import melscale_fbanks

    found = levels(tone(hertz, 2.0, level=0.1), RATE)
    assert found.shape[0] == BANDS
    middle = found[:, found.shape[1] // 2]
    # The band with the largest weight at that pitch, by torchaudio's own banks over a fine grid of pitches.
    banks = melscale_fbanks(22051, 30.0, RATE / 2, BANDS, RATE, mel_scale="slaney")
    assert abs(middle.argmax().item() - banks[hertz].argmax().item()) <= 1
    assert middle.max().item() == pytest.approx(-20, abs=4)
    assert found.min() == FLOOR_DB


def test_the_picture_is_a_whole_png_with_silence_dark_and_pitch_upwards(tmp_path):
    clip = torch.cat([tone(200, 1.0), torch.zeros(2, RATE), tone(8000, 1.0)], dim=1)
    write_spectrogram(tmp_path / "x.png", clip, RATE)
    shades, palette = pixels((tmp_path / "x.png").read_bytes())
    assert shades.shape[0] == BANDS * POINTS_PER_BAND
    assert len(palette) == 3 * 256
    assert tuple(palette[:3]) == COLOURS[0]
    assert tuple(palette[-3:]) == COLOURS[-1]
    thirds = shades.shape[1] // 3
    low, silent, high = (shades[:, (2 * third + 1) * thirds // 2] for third in range(3))
    assert silent.max() == 0
    # Rows are counted from the top.
    assert low.float().argmax() > high.float().argmax()


def test_long_and_short_clips_are_pictures_of_bounded_width(tmp_path):
    for seconds in (0.05, 380):
        clip = torch.zeros(2, int(seconds * RATE))
        assert 1 <= levels(clip, RATE).shape[1] <= WIDEST
