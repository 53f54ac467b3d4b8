"""Loudness is the standard's: its filters in float64, its gates, and cases of EBU Tech 3341."""

import math

import numpy as np
import pytest

from sa3dist.data.source.audio import SAMPLE_RATE_RANGE_HZ
from sa3dist.inspection.loudness import PIECES_PER_SECOND, k_weighted, k_weighting
from sa3dist.inspection.measure import FULL_SCALE, Measurement
from tests.helpers.clips import tone

RATES = [1000, 8000, 11025, 44100, 192000]


def measure(samples_NC, rate, block=1 << 17):
    measurement = Measurement()
    for start in range(0, len(samples_NC), block):
        measurement(samples_NC[start : start + block], rate)
    return measurement.finish()


def weighted_exactly(samples_NC, rate):
    import scipy.signal

    weighted_NC = samples_NC.astype(np.float64)
    for b, a in k_weighting(rate):
        weighted_NC = scipy.signal.lfilter(b, a, weighted_NC, axis=0)
    return weighted_NC


def loudness_exactly(samples_NC, rate):
    """Annex 1 of BS.1770-4 word for word: blocks of 400 ms every 100 ms, two gates."""
    power_N = np.square(weighted_exactly(samples_NC, rate)).sum(axis=1)
    step = round(rate / 10)
    starts = range(0, len(power_N) - 4 * step + 1, step)
    power = np.array([power_N[start : start + 4 * step].mean() for start in starts] or [power_N.mean()])
    loudness = -0.691 + 10 * np.log10(power + 1e-300)
    if len(starts) == 0:
        return loudness[0]
    kept = loudness > -70
    if not kept.any():
        return -math.inf
    kept &= loudness > -0.691 + 10 * np.log10(power[kept].mean()) - 10
    return -0.691 + 10 * math.log10(power[kept].mean())


def hard_signals(rate):
    rng = np.random.default_rng(rate)
    time_N = np.arange(round(3.37 * rate)) / rate
    hiss_N = 1e-3 * rng.standard_normal(len(time_N))
    clicks_N = np.zeros(len(time_N))
    clicks_N[:: round(0.213 * rate)] = 1
    speech_N = rng.standard_normal(len(time_N)) * 0.3 * (np.sin(2 * np.pi * 1.7 * time_N) > 0.2) + hiss_N / 100
    yield "clicks", clicks_N
    yield "rumble at the high pass's corner", 0.5 * np.sin(2 * np.pi * 38 * time_N)
    yield "hiss 54 dB below a rumble that the high pass takes out", hiss_N + 0.5 * np.sin(2 * np.pi * 5 * time_N)
    yield "hiss on an offset", hiss_N + 0.5
    yield "bursts, as speech has", speech_N


@pytest.mark.parametrize("rate", RATES)
def test_hard_signals_are_within_a_thousandth_of_the_filters_in_float64(rate):
    for name, samples_N in hard_signals(rate):
        # Channels that differ, and an end that fills no gating block.
        samples_NC = np.stack([samples_N, 0.3 * np.roll(samples_N, 77)], axis=1).astype(np.float32)
        for samples in (samples_NC, samples_NC[:, :1]):
            assert measure(samples, rate).lufs == pytest.approx(loudness_exactly(samples, rate), abs=1e-3), name


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_every_sample_behind_the_first_100_ms_is_as_the_filters_in_float64_leave_it(rate):
    piece = rate // PIECES_PER_SECOND
    samples_NC = np.random.default_rng(1).standard_normal((12 * piece, 2)).astype(np.float32)
    samples_NC[3 * piece : 5 * piece] *= 1e-3
    found_CN = k_weighted(np.ascontiguousarray(samples_NC.T), rate)
    expected_CN = weighted_exactly(samples_NC, rate).T
    np.testing.assert_allclose(found_CN[:, piece:], expected_CN[:, piece:], atol=3e-6)


@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.25, 0.39999])
def test_a_clip_below_400_ms_is_measured_whole_and_what_its_end_sets_ringing_is_not(seconds):
    samples = tone(seconds, 44100, channels=2, hertz=200.0, peak=0.1).astype(np.float32) + np.float32(0.5)
    assert measure(samples, 44100).lufs == pytest.approx(loudness_exactly(samples, 44100), abs=1e-4)


def test_a_gating_block_that_the_clip_does_not_fill_does_not_count():
    samples = tone(1.0, 48000, peak=0.1).astype(np.float32)
    loud_end = np.concatenate([samples, np.full((4799, 1), 0.9, np.float32)])
    assert measure(loud_end, 48000).lufs == pytest.approx(measure(samples, 48000).lufs, abs=1e-5)


@pytest.mark.parametrize("levels", [[(20, -23)], [(10, -36), (60, -23), (10, -36)], [(10, -72), (10, -36), (60, -23)]])
def test_the_tones_of_ebu_tech_3341_are_minus_23_lufs(levels):
    # Cases 1, 3 and 4 without its mirror image: a 1 kHz sine in both channels, at the levels given in dBFS.
    parts = [tone(s, 48000, channels=2, hertz=1000.0, peak=10 ** (level / 20)) for s, level in levels]
    assert measure(np.concatenate(parts).astype(np.float32), 48000).lufs == pytest.approx(-23.0, abs=0.06)


def test_the_filters_are_stable_and_ring_for_less_than_100_ms_at_any_sample_rate():
    low, high = SAMPLE_RATE_RANGE_HZ
    for rate in (low, 3363, 3364, 4001, 11025, 44056, 47951, high):
        assert all(np.abs(np.roots(a)).max() < 1 for _, a in k_weighting(rate))
        piece = round(rate / PIECES_PER_SECOND)
        # What lies in front of the piece before is below float32's rounding, and so is what runs round to the start.
        assert np.abs(weighted_exactly(np.eye(1, 3 * piece)[0], rate)[piece:]).max() < 1e-7


@pytest.mark.parametrize("hertz", [997.0, 8000.0])
def test_a_tone_at_full_scale_is_weighted_without_clipping(hertz):
    samples = tone(1.0, 44100, channels=2, hertz=hertz, peak=1.0).astype(np.float32)
    assert measure(samples, 44100).lufs == pytest.approx(loudness_exactly(samples, 44100), abs=1e-3)


@pytest.mark.parametrize("block", [997, 4410, 30_000])
def test_flat_tops_are_counted_wherever_blocks_and_pieces_meet(block):
    samples = np.zeros((44100, 2), np.float32)
    rng = np.random.default_rng(2)
    # Around every tenth of a second, and anywhere else.
    for start in [*range(4410 - 3, 44100, 4410), *rng.integers(0, 44000, 40).tolist()]:
        samples[start : start + int(rng.integers(1, 9)), int(rng.integers(2))] = rng.choice([-1, 1])
    full = np.abs(samples) >= FULL_SCALE
    expected = (full[:-2] & full[1:-1] & full[2:]).sum()
    assert measure(samples, 44100, block).clipped_samples == expected > 50


def test_figures_do_not_depend_on_the_clip_before_or_beside():
    rng = np.random.default_rng(3)
    clips = [rng.standard_normal((n, c)).astype(np.float32) / 9 for n, c in [(70_000, 2), (9_000, 1), (50_001, 2)]]
    alone = [measure(samples, 44100) for samples in clips]
    beside = [Measurement() for _ in clips]
    for measurement, samples in zip(beside, clips, strict=True):
        measurement(samples[:5000], 44100)
    for measurement, samples in zip(beside, clips, strict=True):
        measurement(samples[5000:], 44100)
    for one, other in zip(alone, [measurement.finish() for measurement in beside], strict=True):
        assert (one.lufs, one.peak_dbfs) == (other.lufs, other.peak_dbfs)
        assert np.array_equal(one.spectrogram_SP, other.spectrogram_SP)
        assert np.array_equal(one.fingerprint, other.fingerprint)
