"""Decode and check audio files. Suffixes: N samples, C channels."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from sa3dist.data.source.joined_streams import check_end, mp3_counted, refuse_lost
from sa3dist.data.source.resample import ready_audio, resampled_length
from sa3dist.data.source.riff import mended
from sa3dist.data.source.tar_writer import read_clip
from sa3dist.errors import DataError
from sa3dist.flow.crops import SILENCE_PEAK
from sa3dist.formats import ClipEntry, DatasetIndex

if TYPE_CHECKING:
    import torch
    from soundfile import SoundFile

# A tenth of a latent frame: a shorter file has no sound to learn from and is a mistake, such as a 1-sample export.
MIN_SECONDS = 0.010
# The longest model hears 380 s at once; an hour decoded at 48 kHz stereo already takes 1.4 GB of memory.
MAX_SECONDS = 3600
# Bounds the memory of a small file with many channels: one hour of stereo at 192 kHz in float32 is 5.5 GB.
MAX_DECODED_BYTES = 6 * 10**9
# Float files may overshoot and are clamped, as in the reference. At +40 dBFS the scale itself is wrong (integers
# as floats peak at 32768) and clamping would leave a square wave.
MAX_PEAK = 100.0
# Telephone recordings have 8 kHz, DXD 352.8 kHz; a rate beyond this range means a damaged header.
SAMPLE_RATE_RANGE_HZ = (1000, 768_000)
# libmpg123 may count one or two frames of 1152 samples more than it delivers, without any damage.
MP3_SLACK_SAMPLES = 2304
CONTAINER_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF"}
EXPECTED = "expected WAV, FLAC, MP3, OGG, OPUS, AIFF, AU, CAF or W64"
DECODE_BLOCK_SAMPLES = 1 << 18
# Small enough for a core's cache (1 MB), for data that is only inspected.
CHECK_BLOCK_VALUES = 1 << 18


@dataclasses.dataclass(frozen=True)
class AudioFacts:
    """Result of a decode check: samples per channel, sample rate in Hz, channels."""

    samples: int
    sample_rate_hz: int
    channels: int


def check_audio(data: bytes, observe: Callable[[np.ndarray, int], None] | None = None) -> AudioFacts:
    """Decode ``data`` block by block, in memory independent of its length; raise DataError if it cannot be trained on.

    observe   called with every block, float32 (samples, channels), which the next one overwrites, and the sample rate
              in Hz
    The DataError has no file name. Causes: undecodable, empty, shorter than 10 ms or longer than an hour, NaN or
    infinity, never above -60 dBFS, cut off, or audio that is not decoded. Content decides the format, not the
    extension.
    """
    samples, peak = 0, 0.0
    check_end(data)
    with _open(data) as sound:
        rate, channels, declared = sound.samplerate, sound.channels, _declared_samples(sound)
        _check_size(rate, channels, declared)
        buffer = np.empty((CHECK_BLOCK_VALUES // channels or 1, channels), np.float32)
        for block in _blocks(sound, len(buffer), buffer):
            samples += len(block)
            _check_size(rate, channels, samples)
            # NaN makes both of them NaN.
            low, high = float(block.min()), float(block.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DataError("holds NaN or infinite samples, expected finite ones; export it again")
            peak = max(peak, high, -low)
            if observe:
                observe(block, rate)
        slack = 0
        if sound.format == "MP3":
            slack = declared if mp3_counted(data) is None else MP3_SLACK_SAMPLES
    if samples == 0:
        raise DataError("is empty (0 samples); replace or remove it")
    if samples + slack < declared:
        raise DataError(f"is cut off: only {samples} of {declared} samples decode; copy or export it again")
    _refuse_lost(data, samples)
    if samples < MIN_SECONDS * rate:
        raise DataError(
            f"has {samples} sample{'s' * (samples != 1)} ({1000 * samples / rate:.3g} ms at {rate} Hz), "
            f"expected at least {1000 * MIN_SECONDS:.0f} ms; replace or remove it"
        )
    if peak < SILENCE_PEAK:
        level = f"peak {20 * math.log10(peak):.0f} dBFS" if peak > 0 else "every sample is 0"
        raise DataError(f"is silent ({level}, expected above -60 dBFS); replace or remove it")
    if peak > MAX_PEAK:
        raise DataError(f"peaks at {peak:.3g} times full scale, expected about 1 at most; normalise it")
    return AudioFacts(samples, rate, channels)


def decode(data: bytes) -> tuple[np.ndarray, int]:
    """All samples of ``data``: float32 (channels, n), full scale = 1, and the sample rate in Hz.

    Raises DataError, without a file name, when libsndfile cannot decode it.
    """
    with _open(data) as sound:
        _check_size(sound.samplerate, sound.channels, _declared_samples(sound))
        blocks, rate, channels = list(_blocks(sound)), sound.samplerate, sound.channels
    # Sized by what was decoded, not by the header; transposed and joined in one pass.
    samples_CN = np.empty((channels, sum(map(len, blocks))), np.float32)
    start = 0
    for block in blocks:
        samples_CN[:, start : start + len(block)] = block.T
        start += len(block)
    return samples_CN, rate


def load_clip_audio(
    index: DatasetIndex, entry: ClipEntry, sample_rate_hz: int, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """The whole clip ready for cropping: float32 (2, n) in [-1, 1] at ``sample_rate_hz``, n = resampled_length(...).

    start, stop   return only ``[:, start:stop]``, with equal bits. Decodes only that part and, for encodings whose
                  samples depend on earlier ones, what comes before; a clip that is resampled is decoded whole

    Reads only the clip's audio bytes, at their offset in the shard or through the index's reader. Mono is duplicated;
    of more than two channels the first two are used (spec/training.md 4.2, whose clamp comes after crop and flip but
    commutes with both). Raises DataError naming shard and clip when the bytes differ from those checked when the shard
    was written.
    """
    data = index.reader(entry) if index.reader else read_clip(index.directory / entry.shard, entry)
    rate, samples = entry.sample_rate_hz, entry.samples
    start, stop, _ = slice(start, stop).indices(resampled_length(samples, rate, sample_rate_hz))
    stop = max(start, stop)
    try:
        if rate != sample_rate_hz:
            return ready_audio(*_decode_part(data, entry, 0, samples), rate, sample_rate_hz)[:, start:stop].contiguous()
        return ready_audio(*_decode_part(data, entry, start, stop), rate, rate)
    except DataError as error:
        raise DataError(f"{index.directory / entry.shard}, clip {entry.key}: {error}") from error


def _decode_part(data: bytes, entry: ClipEntry, start: int, stop: int) -> tuple[np.ndarray, bool]:
    """Samples ``start`` to ``stop``, float32 (channels, n), and whether the encoding itself keeps them in [-1, 1]."""
    if start:
        # A FLAC's seek table may be wrong although the whole file decodes.
        with contextlib.suppress(DataError):
            return _read_part(data, entry, start, stop, seek=True)
    return _read_part(data, entry, start, stop, seek=False)


def _read_part(data: bytes, entry: ClipEntry, start: int, stop: int, seek: bool) -> tuple[np.ndarray, bool]:
    with _open(data) as sound:
        _check_size(sound.samplerate, sound.channels, _declared_samples(sound))
        bounded = sound.subtype.startswith("PCM_")
        first = sound.seek(start) if seek and (bounded or sound.subtype in ("FLOAT", "DOUBLE")) else 0
        # Ask for one sample more than the index says, so that extra audio is noticed.
        wanted = stop - first + (stop == entry.samples)
        part_NC = next(_blocks(sound, wanted), np.empty((0, sound.channels), np.float32))[start - first :]
        found = (sound.channels, len(part_NC)), sound.samplerate
    if found != ((entry.channels, stop - start), entry.sample_rate_hz):
        raise DataError(
            f"decodes to {found[0]} at {found[1]} Hz, the index says {(entry.channels, stop - start)} at "
            f"{entry.sample_rate_hz} Hz. Another libsndfile wrote it; run sa3dist shard on this machine."
        )
    # By numpy: torch takes 16 times as long for this transpose.
    return np.ascontiguousarray(part_NC.T), bounded


@contextlib.contextmanager
def _open(data: bytes) -> Iterator[SoundFile]:
    """The decoder of ``data``, its header completed. Refusals by libsndfile, here or in the block, become DataError."""
    import soundfile

    try:
        sound = soundfile.SoundFile(io.BytesIO(mended(data)))
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise _undecodable(error) from error
    try:
        with sound:
            if sound.format not in CONTAINER_FORMATS:
                raise DataError(f"is {sound.format} inside, {EXPECTED}; convert it")
            yield sound
    except soundfile.LibsndfileError as error:
        raise _undecodable(error) from error


def check_whole(data: bytes, samples: int) -> None:
    """Raise DataError when ``data`` holds more audio than the ``samples`` that were once decoded from it."""
    check_end(data)
    _refuse_lost(data, samples)


def _refuse_lost(data: bytes, samples: int) -> None:
    refuse_lost(data, samples)
    start = data.find(b"fLaC") if data.startswith((b"fLaC", b"ID3")) else -1
    if start < 0:
        return
    # The last 36 of these bits count a FLAC's samples; libsndfile stops there, whatever follows.
    more = bytearray(data)
    struct.pack_into(">Q", more, start + 18, struct.unpack_from(">Q", data, start + 18)[0] + 1)
    lost = 0
    with contextlib.suppress(DataError), _open(bytes(more)) as sound:
        lost = sound.format == "FLAC" and sound.seek(samples) == samples and len(sound.read(1))
    if lost:
        raise DataError(f"holds more than the {samples} samples its header counts; write it again (flac -d -F, flac)")


def _declared_samples(sound: SoundFile) -> int:
    # A FLAC written to a pipe: libsndfile reports 2^63 - 1 samples, and soundfile cannot read it in blocks.
    if sound.frames >= 1 << 62:
        raise DataError("does not say how long it is, as if written to a pipe; write it to a file again (flac -f)")
    return sound.frames


def _blocks(
    sound: SoundFile, block_samples: int = DECODE_BLOCK_SAMPLES, out: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """float32 (samples, channels), in ``out`` where that is given."""
    while len(block := sound.read(block_samples, dtype="float32", always_2d=True, out=out)):
        yield block


def _undecodable(error: Exception) -> DataError:
    # error_string omits the address of the in-memory file, which str(error) shows.
    reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
    return DataError(f"cannot be decoded ({reason}), {EXPECTED}; export it again")


def _check_size(rate: int, channels: int, samples: int) -> None:
    low, high = SAMPLE_RATE_RANGE_HZ
    if not low <= rate <= high:
        raise DataError(f"has a sample rate of {rate} Hz, expected {low} to {high}; export it again")
    if samples > MAX_SECONDS * rate:
        raise DataError(f"is longer than {MAX_SECONDS} s; cut it into shorter clips")
    if 4 * samples * channels > MAX_DECODED_BYTES:
        raise DataError(
            f"decodes to {4 * samples * channels} bytes, expected at most {MAX_DECODED_BYTES}; cut it into shorter ones"
        )
