"""Decoding, the checks of one clip, resampling, and reading a clip back from its shard."""

import contextlib
import dataclasses
import io
import os
import random
import struct
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from sa3dist.data.source import audio, tar_writer
from sa3dist.data.source import resample as resampling
from sa3dist.data.source.audio import AudioFacts, check_audio, decode, load_clip_audio
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.resample import resample, resampled_length
from sa3dist.errors import DataError
from tests.helpers.clips import captioned, encode, tone, write_zip

LOSSLESS = [
    ("WAV", "PCM_16", 2**-15),
    ("WAV", "PCM_24", 2**-23),
    ("FLAC", "PCM_24", 2**-23),
    ("AIFF", "PCM_16", 2**-15),
]
LOSSY = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]


def test_a_wav_of_the_standard_library_decodes_to_its_integers():
    rng = np.random.default_rng(1)
    integers = rng.integers(-(2**15), 2**15, (1000, 2), dtype=np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(32000)
        file.writeframes(integers.astype("<i2").tobytes())
    samples, rate = decode(out.getvalue())
    assert rate == 32000
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, integers.T / np.float32(2**15))


@pytest.mark.parametrize(("container", "subtype", "step"), LOSSLESS)
def test_lossless_formats_decode_to_the_samples_written(container, subtype, step):
    original = tone(0.2, 48000, 2)
    data = encode(original, 48000, container, subtype)
    samples, rate = decode(data)
    assert rate == 48000
    np.testing.assert_allclose(samples.T, original, atol=step, rtol=0)
    assert check_audio(data) == AudioFacts(9600, 48000, 2)


@pytest.mark.parametrize(("container", "subtype"), LOSSY)
def test_lossy_formats_decode_to_nearly_the_samples_written(container, subtype):
    original = tone(1.0, 48000, 2)
    samples, rate = decode(encode(original, 48000, container, subtype))
    assert (rate, samples.shape) == (48000, (2, 48000))
    noise = np.sqrt(np.mean((samples.T[2000:-2000] - original[2000:-2000]) ** 2))
    assert noise < 0.05 * np.sqrt(np.mean(original**2))


def _endless_flac():
    data = bytearray(encode(tone(1.0), container="FLAC"))
    # The last 36 bits before the MD5 in STREAMINFO count the samples; 0 means unknown (a FLAC written to a pipe).
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


def _half(container, subtype=None, rate=44100):
    data = encode(tone(2.0, rate), rate, container, subtype)
    return data[: len(data) // 2]


def _with(sample, position=1234):
    samples = tone()
    samples[position] = sample
    return encode(samples, subtype="FLOAT")


BAD = {
    "garbage": (b"RIFF" + bytes(range(256)) * 4, "cannot be decoded"),
    "nothing": (b"", "cannot be decoded"),
    "text": (b"just some words " * 50, "cannot be decoded"),
    "no samples": (encode(tone()[:0]), "is empty"),
    "one sample": (encode(tone()[:1]), r"has 1 sample \(0.0227 ms at 44100 Hz\), expected at least 10 ms"),
    "440 samples": (encode(tone()[:440]), "has 440 samples"),
    "nan": (_with(np.nan), "NaN or infinite"),
    "inf": (_with(-np.inf), "NaN or infinite"),
    "zeros": (encode(tone(peak=0)), "is silent"),
    "below -60 dBFS": (encode(tone(peak=0.00099), subtype="PCM_24"), r"is silent \(peak -60 dBFS"),
    "integers as floats": (encode(tone(peak=20000.0), subtype="FLOAT"), r"peaks at 2e\+04 times full scale"),
    "half an mp3": (_half("MP3"), "is cut off: only"),
    "half a flac": (_half("FLAC"), "cannot be decoded"),
    "half an ogg": (_half("OGG"), "is cut off: at least [0-9]+ bytes are missing"),
    "half an opus": (_half("OGG", "OPUS", 48000), "is cut off: at least [0-9]+ bytes are missing"),
    "half a wav": (_half("WAV"), "is cut off: at least 88222 bytes are missing"),
    **{f"half an {kind}": (_half(kind), "is cut off: ") for kind in ("AIFF", "AU", "RF64", "W64")},
    "flac of unknown length": (_endless_flac(), "does not state its length"),
    "another format": (encode(tone(), container="VOC", subtype="PCM_16"), "is VOC inside, expected WAV"),
    "1 Hz": (encode(tone(), rate=1), "has a sample rate of 1 Hz, expected 1000 to 768000"),
}


@pytest.mark.parametrize("name", BAD)
def test_audio_that_cannot_be_trained_on_is_refused_in_one_line(name):
    data, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        check_audio(data)
    assert "\n" not in str(caught.value)


def test_the_limits_themselves_are_accepted():
    assert check_audio(encode(tone()[:441])).samples == 441
    assert check_audio(encode(tone(peak=0.00101), subtype="PCM_24")).samples == len(tone())


def test_a_file_of_hours_is_refused_by_its_header_alone(monkeypatch):
    monkeypatch.setattr(audio, "MAX_SECONDS", 2)
    # All decoding goes through it, and nothing public does that.
    monkeypatch.setattr(audio, "_blocks", lambda sound: pytest.fail("decoded before its length was looked at"))
    with pytest.raises(DataError, match="is longer than 2 s; cut it"):
        check_audio(encode(tone(2.1)))


def test_a_header_that_claims_more_channels_than_memory_is_refused(monkeypatch):
    monkeypatch.setattr(audio, "MAX_DECODED_BYTES", 100_000)
    with pytest.raises(DataError, match="decodes to 105840 bytes, expected at most 100000"):
        check_audio(encode(tone(0.3, channels=2)))


@pytest.mark.parametrize(
    ("rate", "samples"), [(22050, 5001), (32000, 7777), (48000, 9601), (96000, 20011), (8000, 999)]
)
def test_resampling_equals_torchaudio(rate, samples):
    x = torch.randn(2, samples, generator=torch.Generator().manual_seed(rate))
    ours = resample(x, rate, 44100)
    assert torch.equal(ours, torchaudio.functional.resample(x, rate, 44100))
    assert ours.shape[-1] == resampled_length(samples, rate, 44100)


@pytest.mark.parametrize(("old", "new"), [(160, 147), (147, 320), (96000, 44100), (1009, 1500), (7, 3)])
def test_filtering_sample_by_sample_equals_the_tabulated_filter(monkeypatch, old, new):
    divisor = np.gcd(old, new)
    old, new = int(old // divisor), int(new // divisor)
    x = torch.randn(2, 4001, generator=torch.Generator().manual_seed(new), dtype=torch.float64)
    tabulated = torchaudio.functional.resample(x, old, new)
    monkeypatch.setattr(resampling, "MAX_FILTER_TABLE", 0)
    by_sample = resample(x, old, new)
    torch.testing.assert_close(by_sample.double(), tabulated, atol=2e-6, rtol=0)


def test_rates_without_a_common_divisor_resample_in_little_memory():
    # 44100 filters of 48,000 taps: torchaudio would need 8 GB for its table.
    rate, hertz = 48001, 500.0
    x = torch.from_numpy(tone(0.5, rate, hertz=hertz).T.copy())
    y = resample(x, rate, 44100)
    assert y.shape[-1] == resampled_length(x.shape[-1], rate, 44100)
    expected = tone(0.5, 44100, hertz=hertz).T
    length = expected.shape[-1]
    torch.testing.assert_close(
        y[:, 200 : length - 200], torch.from_numpy(expected[:, 200 : length - 200]), atol=2e-3, rtol=0
    )


def test_lengths_beyond_float32_are_exact():
    # torchaudio forms this length in float32, whose spacing is 4 here.
    samples = 40_000_001
    assert resampled_length(samples, 48000, 44100) == 36_750_001
    assert resampled_length(10, 44100, 44100) == 10


def _shards(tmp_path, **clips):
    members = captioned(4) | {f"{name}.wav": data for name, data in clips.items()}
    members |= {f"{name}.txt": b"extra" for name in clips}
    return build_shards(str(write_zip(tmp_path / "in.zip", members)), tmp_path / "work")


def _clip(index, key):
    return next(clip for clip in index.clips if clip.key == key)


def test_loading_clamps_and_makes_two_channels(tmp_path):
    mono, six = tone(peak=1.5), tone(channels=6)
    index = _shards(tmp_path, mono=encode(mono, subtype="FLOAT"), six=encode(six, subtype="FLOAT"))
    loaded = load_clip_audio(index, _clip(index, "mono"), 44100)
    assert (loaded.dtype, loaded.shape) == (torch.float32, (2, len(mono)))
    assert torch.equal(loaded, torch.from_numpy(mono.T).clamp(-1, 1).expand(2, -1))
    assert torch.equal(load_clip_audio(index, _clip(index, "six"), 44100), torch.from_numpy(six.T[:2].copy()))


def test_loading_resamples_before_it_clamps(tmp_path):
    samples = tone(rate=48000, channels=2, peak=1.4)
    index = _shards(tmp_path, loud=encode(samples, 48000, subtype="FLOAT"))
    expected = torchaudio.functional.resample(torch.from_numpy(samples.T.copy()), 48000, 44100).clamp(-1, 1)
    assert torch.equal(load_clip_audio(index, _clip(index, "loud"), 44100), expected)


PARTS = {
    "pcm16.wav": (44100, "WAV", "PCM_16", 2),
    "float.wav": (44100, "WAV", "FLOAT", 1),
    "double.aiff": (44100, "AIFF", "DOUBLE", 2),
    "pcm24.flac": (44100, "FLAC", "PCM_24", 2),
    "six.flac": (44100, "FLAC", "PCM_16", 6),
    "vorbis.ogg": (44100, "OGG", "VORBIS", 2),
    "opus.opus": (48000, "OGG", "OPUS", 2),
    "mpeg.mp3": (44100, "MP3", None, 2),
    "law.wav": (44100, "WAV", "ULAW", 1),
    "other.flac": (32000, "FLAC", "PCM_16", 2),
}


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    """Noise in many encodings: what a decoder keeps from one sample to the next would show."""
    rng = np.random.default_rng(5)
    members = {}
    for name, (rate, container, subtype, channels) in PARTS.items():
        noise = rng.uniform(-0.9, 0.9, (rate * 3 // 2 + 17, channels)).astype(np.float32)
        members |= {name: encode(noise, rate, container, subtype), f"{name.partition('.')[0]}.txt": b"noise"}
    folder = tmp_path_factory.mktemp("parts")
    return build_shards(str(write_zip(folder / "in.zip", members)), folder / "work")


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_bit_for_bit_that_of_the_whole(parted, name):
    clip = _clip(parted, name.partition(".")[0])
    whole_CN = load_clip_audio(parted, clip, 44100)
    length = whole_CN.shape[1]
    assert length == resampled_length(clip.samples, clip.sample_rate_hz, 44100)
    drawn = random.Random(name)
    assert load_clip_audio(parted, clip, 44100, 500, 400).shape == (2, 0)
    starts = [0, 0, 1, length - 1, length, length + 5] + [drawn.randrange(length) for _ in range(30)]
    for start in starts:
        stop = start + drawn.choice([0, 1, 4096, drawn.randrange(length), 2 * length])
        part_CN = load_clip_audio(parted, clip, 44100, start, stop)
        assert part_CN.is_contiguous()
        assert torch.equal(part_CN, whole_CN[:, start:stop]), (start, stop)


@pytest.mark.parametrize(("name", "most"), [("pcm24", 1000), ("float", 1000), ("vorbis", 31000), ("mpeg", 31000)])
def test_no_more_is_decoded_than_the_part_needs(parted, name, most, monkeypatch):
    decoded = []
    read = soundfile.SoundFile.read

    def counted(self, *args, **kwargs):
        block = read(self, *args, **kwargs)
        decoded.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    load_clip_audio(parted, _clip(parted, name), 44100, 30000, 31000)
    assert sum(decoded) == most


def test_a_flac_whose_table_of_tar_writer_is_wrong_gives_the_same_part(tmp_path):
    noise = np.random.default_rng(6).uniform(-0.9, 0.9, (200_000, 2)).astype(np.float32)
    data = encode(noise, container="FLAC")
    # After STREAMINFO: two points, (first sample, offset from the first frame, samples), of which the second lies.
    points = struct.pack(">QQHQQH", 0, 0, 4096, 81920, 200_000, 4096)
    lying = data[:42] + b"\x03" + len(points).to_bytes(3, "big") + points + data[42:]
    with pytest.raises(soundfile.LibsndfileError), soundfile.SoundFile(io.BytesIO(lying)) as sound:
        sound.seek(90_000)
    index = build_shards(
        str(write_zip(tmp_path / "in.zip", captioned(4) | {"lying.flac": lying, "lying.txt": b"x"})), tmp_path / "work"
    )
    part_CN = load_clip_audio(index, _clip(index, "lying"), 44100, 90_000, 100_000)
    assert np.array_equal(part_CN, decode(data)[0][:, 90_000:100_000])


def test_a_part_of_a_clip_that_decodes_otherwise_than_the_index_says_is_refused(parted):
    clip = _clip(parted, "pcm24")
    for wrong in ({"samples": clip.samples + 9}, {"samples": clip.samples - 9}, {"channels": 1}):
        claimed = dataclasses.replace(clip, **wrong)
        with pytest.raises(DataError, match="clip pcm24: decodes to .* the index says"):
            load_clip_audio(parted, claimed, 44100, 1000, None)


def test_one_flipped_byte_in_a_shard_is_noticed_and_named(tmp_path):
    index = _shards(tmp_path)
    clip = _clip(index, "clip2")
    shard = index.directory / clip.shard
    data = bytearray(shard.read_bytes())
    data[clip.audio_offset + clip.audio_bytes // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000000.tar, clip clip2: the audio bytes are not the ones in the index"):
        load_clip_audio(index, clip, 44100)
    assert load_clip_audio(index, _clip(index, "clip1"), 44100).shape == (2, 13230)


def test_a_byte_flipped_anywhere_in_a_shard_is_noticed_in_its_clip_or_changes_no_audio(tmp_path, monkeypatch):
    index = _shards(tmp_path)
    (shard,) = {index.directory / clip.shard for clip in index.clips}
    whole = shard.read_bytes()
    expected = {clip.key: load_clip_audio(index, clip, 44100) for clip in index.clips}
    draw = random.Random(3)
    noticed = 0
    for place in (draw.randrange(len(whole)) for _ in range(50)):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        # As the first read of a process that has seen nothing.
        monkeypatch.setattr(tar_writer, "_verified", {})
        for clip in index.clips:
            if clip.audio_offset <= place < clip.audio_offset + clip.audio_bytes:
                noticed += 1
                with pytest.raises(DataError, match=f"clip {clip.key}: the audio bytes are not the ones in the index"):
                    load_clip_audio(index, clip, 44100)
            else:
                assert torch.equal(load_clip_audio(index, clip, 44100), expected[clip.key])
    assert noticed > 30


def test_a_clip_is_hashed_when_first_read_and_again_when_its_shard_was_written_to(tmp_path, monkeypatch):
    index = _shards(tmp_path)
    clip = _clip(index, "clip2")
    shard = index.directory / clip.shard
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[clip.audio_offset + 100] ^= 1
    # Each the first read of a process that has seen nothing.
    for data, good in [(bytes(flipped), False), (whole, True)]:
        monkeypatch.setattr(tar_writer, "_verified", {})
        shard.write_bytes(data)
        if good:
            expected = load_clip_audio(index, clip, 44100)
        else:
            with pytest.raises(DataError, match="clip clip2: the audio bytes are not the ones"):
                load_clip_audio(index, clip, 44100)
    hashed = []
    original = tar_writer.hashlib.sha256
    monkeypatch.setattr(tar_writer.hashlib, "sha256", lambda data: hashed.append(len(data)) or original(data))
    assert torch.equal(load_clip_audio(index, clip, 44100), expected)
    assert hashed == []
    # As a copy over it, a restored backup or a repaired disk would: the time of the file is another one.
    shard.write_bytes(flipped)
    os.utime(shard, ns=(0, 1))
    with pytest.raises(DataError, match="clip clip2: the audio bytes are not the ones"):
        load_clip_audio(index, clip, 44100)
    shard.write_bytes(whole)
    os.utime(shard, ns=(0, 2))
    assert torch.equal(load_clip_audio(index, clip, 44100), expected)
    assert hashed == [clip.audio_bytes] * 2


def test_a_missing_or_short_shard_is_named(tmp_path):
    index = _shards(tmp_path)
    clip = index.clips[-1]
    shard = index.directory / clip.shard
    shard.write_bytes(shard.read_bytes()[: clip.audio_offset + 10])
    with pytest.raises(DataError, match="shard-000000.tar, clip clip3: the audio bytes"):
        load_clip_audio(index, clip, 44100)
    shard.unlink()
    with pytest.raises(DataError, match="shard-000000.tar, clip clip3: cannot be read"):
        load_clip_audio(index, clip, 44100)


def test_a_wav_whose_header_claims_gigabytes_decodes_to_what_is_there():
    data = bytearray(encode(tone()))
    # Programs that write to a pipe leave the sizes at their maximum.
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert check_audio(bytes(data)).samples == len(tone())


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_threads_decode_alike_and_what_is_checked_is_what_is_decoded(container):
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(3).uniform(-0.5, 0.5, (30_000, 2)), 44100, format=container)
    data = out.getvalue()

    def decoded():
        blocks = []
        facts = check_audio(data, lambda block_NC, *_: blocks.append(block_NC.copy()))
        np.testing.assert_array_equal(np.concatenate(blocks).T, decode(data)[0])
        return facts, blocks

    facts, blocks = decoded()
    with ThreadPoolExecutor(2) as threads:
        for found in [threads.submit(decoded) for _ in range(4)]:
            assert found.result()[0] == facts
            np.testing.assert_array_equal(np.concatenate(found.result()[1]), np.concatenate(blocks))


def test_no_descriptor_stays_open(monkeypatch):
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(3).uniform(-0.5, 0.5, (3000, 2)), 44100, format="WAV")
    before = len(os.listdir("/proc/self/fd"))
    for data in (out.getvalue(), out.getvalue()[:60], b"no audio", b""):
        with contextlib.suppress(DataError), ThreadPoolExecutor(1) as thread:
            thread.submit(audio.check_audio, data).result()
    assert len(os.listdir("/proc/self/fd")) == before
