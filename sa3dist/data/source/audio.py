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
from sa3dist.data.source.riff import with_sizes_repaired
from sa3dist.data.source.tar_writer import read_clip
from sa3dist.errors import DataError
from sa3dist.flow.crops import SILENCE_PEAK
from sa3dist.formats import ClipEntry, DatasetIndex

if TYPE_CHECKING:
    import torch
    from soundfile import SoundFile

# A tenth of one latent frame: a shorter file is a mistake, for example an export of one sample.
MIN_SECONDS = 0.010
# Models use at most 380 s at once; an hour of 48 kHz stereo already decodes to 1.4 GB.
MAX_SECONDS = 3600
# Limits what a small file with many channels may decode to: one hour of stereo at 192 kHz, float32, is 5.5 GB.
MAX_DECODED_BYTES = 6 * 10**9
# Float files may overshoot and are clamped, as in the reference. At +40 dBFS the scale itself is wrong (integers
# as floats peak at 32768) and clamping would leave a square wave.
MAX_PEAK = 100.0
# Telephone recordings have 8 kHz, DXD has 352.8 kHz; outside this range the header is damaged.
SAMPLE_RATE_RANGE_HZ = (1000, 768_000)
# libmpg123 may count one or two frames of 1152 samples more than it decodes from an intact file.
MP3_SLACK_SAMPLES = 2304
CONTAINER_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF"}
EXPECTED = "expected WAV, FLAC, MP3, OGG, OPUS, AIFF, AU, CAF or W64"
DECODE_BLOCK_SAMPLES = 1 << 18
# 1 MB: fits in a core's cache.
CHECK_BLOCK_VALUES = 1 << 18


@dataclasses.dataclass(frozen=True)
class AudioFacts:
    """Result of a decode check: samples per channel, sample rate in Hz, channels."""

    samples: int
    sample_rate_hz: int
    channels: int


def check_audio(data: bytes, observe: Callable[[np.ndarray, int], None] | None = None) -> AudioFacts:
    """Decode ``data`` block by block, in constant memory, and refuse what cannot be trained on.

    observe   called with every block, float32 (samples, channels), and the sample rate in Hz; the next block
              overwrites it
    Raises DataError, without a file name, if it is undecodable, empty, shorter than 10 ms or longer than an hour, has
    NaN or infinity, never exceeds -60 dBFS, is truncated, or has audio that is not decoded. The format is decided by
    content, not by extension.
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
            # A NaN makes both NaN.
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

    Raises DataError, without a file name, if libsndfile cannot decode it.
    """
    with _open(data) as sound:
        _check_size(sound.samplerate, sound.channels, _declared_samples(sound))
        blocks, rate, channels = list(_blocks(sound)), sound.samplerate, sound.channels
    # Sized by what was decoded, not by what the header claims; transposed and concatenated in one pass.
    samples_CN = np.empty((channels, sum(map(len, blocks))), np.float32)
    start = 0
    for block in blocks:
        samples_CN[:, start : start + len(block)] = block.T
        start += len(block)
    return samples_CN, rate


def load_clip_audio(
    index: DatasetIndex, entry: ClipEntry, sample_rate_hz: int, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """The clip ready for cropping: float32 (2, n) in [-1, 1] at ``sample_rate_hz``, n = resampled_length(...).

    start, stop   return only ``[:, start:stop]``, bit-identical. Decodes only that, plus all samples before it if the
                  encoding needs them; a clip that is resampled is decoded whole

    Reads only the clip's audio bytes, from the shard or through the index's reader. Mono is duplicated; of more than
    two channels the first two are used (spec/training.md 4.2; its clamp after crop and flip commutes with both).
    Raises DataError naming shard and clip if the bytes are not those that were checked when the shard was written.
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
    """Samples ``start`` to ``stop``, float32 (channels, n), and whether the encoding limits them to [-1, 1]."""
    if start:
        # Seeking may fail in a FLAC with a wrong seek table, although the file decodes.
        with contextlib.suppress(DataError):
            return _read_part(data, entry, start, stop, seek=True)
    return _read_part(data, entry, start, stop, seek=False)


def _read_part(data: bytes, entry: ClipEntry, start: int, stop: int, seek: bool) -> tuple[np.ndarray, bool]:
    with _open(data) as sound:
        _check_size(sound.samplerate, sound.channels, _declared_samples(sound))
        bounded = sound.subtype.startswith("PCM_")
        first = sound.seek(start) if seek and (bounded or sound.subtype in ("FLOAT", "DOUBLE")) else 0
        # At the end, ask for one sample more, to notice a clip longer than the index says.
        wanted = stop - first + (stop == entry.samples)
        part_NC = next(_blocks(sound, wanted), np.empty((0, sound.channels), np.float32))[start - first :]
        shape, rate = (sound.channels, len(part_NC)), sound.samplerate
    if (shape, rate) != ((entry.channels, stop - start), entry.sample_rate_hz):
        raise DataError(
            f"decodes to {shape} at {rate} Hz, the index says {(entry.channels, stop - start)} at "
            f"{entry.sample_rate_hz} Hz. Another libsndfile wrote it; run sa3dist shard on this machine."
        )
    # numpy: torch takes 16 times as long for this transpose.
    return np.ascontiguousarray(part_NC.T), bounded


@contextlib.contextmanager
def _open(data: bytes) -> Iterator[SoundFile]:
    """Open ``data`` for decoding, its header repaired. Errors of libsndfile, also in the block, become DataError."""
    import soundfile

    try:
        sound = soundfile.SoundFile(io.BytesIO(with_sizes_repaired(data)))
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
    """Raise DataError if ``data`` has more audio than the ``samples`` decoded from it earlier."""
    check_end(data)
    _refuse_lost(data, samples)


def _refuse_lost(data: bytes, samples: int) -> None:
    refuse_lost(data, samples)
    start = data.find(b"fLaC") if data.startswith((b"fLaC", b"ID3")) else -1
    if start < 0:
        return
    # libsndfile stops at the sample count of a FLAC's header. Increase it (the last 36 of these bits) by one, and see
    # whether another sample can be decoded.
    more = bytearray(data)
    struct.pack_into(">Q", more, start + 18, struct.unpack_from(">Q", data, start + 18)[0] + 1)
    lost = 0
    with contextlib.suppress(DataError), _open(bytes(more)) as sound:
        lost = sound.format == "FLAC" and sound.seek(samples) == samples and len(sound.read(1))
    if lost:
        raise DataError(f"holds more than the {samples} samples its header counts; write it again (flac -d -F, flac)")


def _declared_samples(sound: SoundFile) -> int:
    # For a FLAC written to a pipe libsndfile reports 2^63 - 1 samples, and soundfile cannot read it in blocks.
    if sound.frames >= 1 << 62:
        raise DataError("does not state its length, as if written to a pipe; write it to a file again (flac -f)")
    return sound.frames


def _blocks(
    sound: SoundFile, block_samples: int = DECODE_BLOCK_SAMPLES, out: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Blocks of float32 (samples, channels), in ``out`` if given."""
    while len(block := sound.read(block_samples, dtype="float32", always_2d=True, out=out)):
        yield block


def _undecodable(error: Exception) -> DataError:
    # Unlike str(error), error_string does not show the address of the in-memory file.
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
