"""Audio behind the end of the first stream is refused with that reason, and what a crashed recorder left is read."""

import io
import struct

import numpy as np
import pytest
import soundfile
import torch

from sa3dist.data.source.audio import check_audio, decode, load_clip_audio
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.joined_streams import _mp3_frames, check_end, mp3_samples
from sa3dist.data.source.riff import with_sizes_repaired
from sa3dist.errors import DataError
from sa3dist.inspection.report import inspect_source
from tests.helpers.clips import captioned, encode, tone, write_zip

FORMATS = [
    ("OGG", "VORBIS", 44100),
    ("OGG", "OPUS", 48000),
    ("MP3", None, 44100),
    ("MP3", None, 22050),
    ("MP3", None, 11025),
    ("FLAC", None, 44100),
    ("WAV", "PCM_16", 44100),
    ("WAV", "IMA_ADPCM", 44100),
    ("WAVEX", "PCM_24", 44100),
    ("RF64", "PCM_16", 44100),
    ("W64", "PCM_16", 44100),
    ("AIFF", "PCM_16", 44100),
    ("AIFF", "FLOAT", 44100),
    ("AU", "PCM_16", 44100),
    ("CAF", "PCM_16", 44100),
    ("CAF", "ALAC_16", 44100),
]


def made(container, subtype, rate, seconds=0.5, hertz=440):
    return encode(tone(seconds, rate, 2, hertz), rate, container, subtype)


def fault_of(data):
    with pytest.raises(DataError) as caught:
        check_audio(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("container", "subtype", "rate"), FORMATS)
def test_two_files_joined_with_cat_are_refused_and_each_alone_is_not(container, subtype, rate):
    first, second = made(container, subtype, rate), made(container, subtype, rate, 1.0, 700)
    for data in (first, second):
        check_audio(data)
    message = fault_of(first + second)
    assert "joined" in message or "second file" in message
    assert "ffmpeg -i IN OUT.flac" in message


@pytest.mark.parametrize("container", ["OGG", "MP3", "AIFF", "WAV"])
def test_a_file_of_another_format_behind_the_first_is_refused_too(container):
    for other in ("FLAC", "WAV", "OGG", "AIFF"):
        if other != container:
            assert "holds a second file" in fault_of(made(container, None, 44100) + made(other, None, 44100))


ID3V2 = b"ID3\x03\0\0\0\0\x01\x00" + bytes(128)
ID3V1 = b"TAG" + b"title".ljust(125, b"\0")
APE_ITEM = struct.pack("<II", 4, 0) + b"Title\0" + b"name"
APE = b"APETAGEX" + struct.pack("<IIIQ", 2000, 32 + len(APE_ITEM), 1, 0xA0000000) + APE_ITEM
APE += b"APETAGEX" + struct.pack("<IIIQ", 2000, 32 + len(APE_ITEM), 1, 0x80000000)


def bare_mp3(seconds, mode="CONSTANT", rate=44100):
    """Frames alone, as some cutters and radio recorders leave them: no header that counts them."""
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", rate, 2, format="MP3", bitrate_mode=mode, compression_level=0.5) as sound:
        sound.write(tone(seconds, rate, 2))
    data = out.getvalue()
    at = data.index(data[:2], 100)
    assert b"Xing" in data[:at] or b"Info" in data[:at]
    return data[at:]


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 32000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_the_frames_of_an_ordinary_mp3_hold_what_is_decoded(rate, channels, mode):
    for seconds in (0.3, 1.7):
        out = io.BytesIO()
        with soundfile.SoundFile(out, "w", rate, channels, format="MP3", bitrate_mode=mode) as sound:
            sound.write(tone(seconds, rate, channels))
        data = out.getvalue()
        for whole in (data, ID3V2 + data, data + ID3V1, data + APE, ID3V2 + data + APE + ID3V1, data + bytes(5000)):
            samples = check_audio(whole).samples
            assert samples - 5 * 1152 < mp3_samples(whole) <= samples


def test_mp3s_are_refused_where_frames_are_not_decoded_whatever_lies_between_them():
    first, second = made("MP3", None, 44100), made("MP3", None, 44100, 1.0)
    for between in (b"", ID3V2, ID3V1 + ID3V2, APE, bytes(3000)):
        assert "would be used, as where files were joined or cut without" in fault_of(first + between + second)
    assert "changes its sample rate or channels" in fault_of(first + made("MP3", None, 22050))
    assert "changes its sample rate or channels" in fault_of(first + encode(tone(1.0), 44100, "MP3"))
    # libmpg123 takes the length of these from the first frame alone.
    assert "would be used, as where files were joined or cut without" in fault_of(bare_mp3(2.0, "VARIABLE"))


@pytest.mark.parametrize("rate", [22050, 44100])
def test_an_mp3_cut_between_any_two_frames_is_read(rate):
    data = bare_mp3(2.0, rate=rate)
    # Where frames begin is no question of users: the reader itself says it, and is held to decode from there.
    for number, (place, _) in enumerate(_mp3_frames(data)):
        if number % 9 == 1:
            check_audio(data[place:])


def test_a_heading_behind_a_checksum_is_one():
    data = made("MP3", None, 44100)
    size = next(_mp3_frames(data))[1][0]
    # The bit that says there is no checksum, and two bytes of one; mono and stereo, both versions.
    for place in (13, 21, 36):
        frame = data[:1] + bytes([data[1] & 0xFE]) + data[2:4] + bytes(place + 2 - 4) + b"Xing" + bytes(400)
        assert mp3_samples(frame[:size] + data[size:]) == mp3_samples(data[size:])


def test_an_mp3_of_frames_alone_is_read_whole_also_joined():
    one = bare_mp3(1.0)
    assert check_audio(one).samples >= 44100
    both = check_audio(one + one).samples
    assert both >= 2 * 44100
    # The decoder's guess is off by more the longer it is.
    long = bare_mp3(1.0) * 200
    assert check_audio(long).samples >= 200 * 44100


def pages_of(data):
    while data:
        size = 27 + data[26] + sum(data[27 : 27 + data[26]])
        yield data[:size]
        data = data[size:]


def test_streams_that_run_beside_each_other_in_an_ogg_file_are_not_joined_ones():
    one, other = (list(pages_of(made("OGG", "VORBIS", 44100, 1.0, hertz))) for hertz in (440, 700))
    check_end(b"".join([one[0], other[0], one[1], other[1], *one[2:], *other[2:]]))
    with pytest.raises(DataError, match="holds 2 streams joined"):
        check_end(b"".join([*one, *other]))
    with pytest.raises(DataError, match="holds 3 streams joined"):
        check_end(b"".join([*one, b"junk between", *other, *one]))


def chunk(name, content, order="<"):
    return name + struct.pack(f"{order}I", len(content)) + content + b"\0" * (len(content) % 2)


def test_covers_tags_and_padding_are_no_second_file():
    inner = made("FLAC", None, 44100)
    outer = made("FLAC", None, 44100, 1.0)
    picture = struct.pack(">II", 3, 9) + b"image/xyz" + bytes(20) + struct.pack(">I", len(inner)) + inner
    # Behind STREAMINFO, a picture that is a FLAC.
    covered = outer[:42] + b"\x06" + len(picture).to_bytes(3, "big") + picture + outer[42:]
    assert check_audio(covered).samples == check_audio(ID3V2 + outer).samples == 44100
    assert "second file" in fault_of(ID3V2 + outer + inner)
    wav = made("WAV", None, 44100)
    tail = chunk(b"LIST", b"INFOICMT" + struct.pack("<I", 6) + b"hello\0") + chunk(b"bext", bytes(602))
    tagged = wav[:4] + struct.pack("<I", len(wav) + len(tail) - 8) + wav[8:] + tail
    for data in (tagged, wav + tail, wav + ID3V1, wav + bytes(200_000), wav + b"\0"):
        assert check_audio(data).samples == 22050


def test_two_pieces_in_one_file_of_chunks_are_refused():
    wav, aiff = made("WAV", None, 44100), made("AIFF", "PCM_16", 44100)
    samples = wav[44:]
    both = wav + chunk(b"data", samples)
    assert "holds 2 pieces of audio" in fault_of(both[:4] + struct.pack("<I", len(both) - 8) + both[8:])
    both = aiff + chunk(b"SSND", bytes(8) + samples, ">")
    assert "holds 2 pieces of audio" in fault_of(both[:4] + struct.pack(">I", len(both) - 8) + both[8:])


def test_a_header_that_was_written_long_before_the_crash_is_refused_with_both_lengths():
    wav = made("WAV", "PCM_16", 44100, 2.0)
    stale = wav[:4] + struct.pack("<I", 36 + 44100) + wav[8:40] + struct.pack("<I", 44100) + wav[44:]
    message = fault_of(stale)
    assert message.startswith("holds 1.8 s more than its header counts (0.2 s), as where a recorder crashed")
    assert "sox --ignore-length" in message


def test_samples_that_a_wav_counts_but_not_as_samples_are_refused_and_its_chunks_are_not():
    wav = made("WAV", "PCM_16", 44100, 2.0)
    message = fault_of(wav[:40] + struct.pack("<I", 44100) + wav[44:])
    assert message.startswith("holds 1.8 s more than its header counts (0.2 s)")
    # A cover, behind samples of odd length that no byte evens.
    tail = chunk(b"id3 ", np.random.default_rng(0).bytes(300_001))
    odd = wav[:4] + struct.pack("<I", len(wav) - 9 + len(tail)) + wav[8:40] + struct.pack("<I", len(wav) - 45)
    for between in (b"", b"\0"):
        assert check_audio(odd + wav[44:-1] + between + tail).samples == 88199


@pytest.mark.parametrize(("container", "before", "kind"), [("AU", 16, ">I"), ("CAF", 12, ">q")])
def test_an_au_or_a_caf_that_holds_more_than_its_header_counts_is_refused(container, before, kind):
    data = made(container, "PCM_16", 44100, 2.0)
    start = data.index(b"data") + 16 if container == "CAF" else 24
    # Four bytes of a CAF's chunk count edits.
    edits = 4 * (container == "CAF")

    def counting(size):
        changed = bytearray(data)
        struct.pack_into(kind, changed, start - before, size + edits)
        return bytes(changed)

    assert counting(352800) == data
    message = fault_of(counting(44100))
    assert message.startswith(f"holds 308700 bytes more than the {44100 + edits} that its header counts")
    # A program that counts its header, and one that does not know a size.
    assert check_audio(counting(352800 - 24)).samples == 88194
    assert check_audio(counting(0xFFFFFFFF if container == "AU" else -1 - edits)).samples == 88200


def test_chunks_behind_the_samples_of_an_aiff_or_a_caf_are_none():
    picture = np.random.default_rng(0).bytes(300_001)
    aiff = made("AIFF", "PCM_16", 44100)
    tail = chunk(b"ID3 ", picture, ">") + chunk(b"ANNO", b"a note", ">")
    for form in (len(aiff) - 8, len(aiff) + len(tail) - 8):
        for end in (tail, tail[:-1], b"ID3" + picture):
            assert check_audio(aiff[:4] + struct.pack(">I", form) + aiff[8:] + end).samples == 22050
    caf = made("CAF", "PCM_16", 44100)
    assert check_audio(caf + b"info" + struct.pack(">q", len(picture)) + picture).samples == 22050


@pytest.mark.parametrize("kind", ["WAV", "AIFF"])
def test_of_a_short_clip_less_than_half_a_second_is_missed_too(kind):
    data = made(kind, "PCM_16", 44100)
    order, head = ("<", 44) if kind == "WAV" else (">", 54)
    at = data.index(b"data" if kind == "WAV" else b"SSND") + 4
    size = struct.pack(f"{order}I", 52920 + head % 44)
    assert fault_of(data[:at] + size + data[at + 4 :]).startswith("holds 0.2 s more than its header counts (0.3 s)")


def test_what_an_aifc_has_more_is_told_in_the_time_of_its_packed_samples():
    data = made("AIFF", "ULAW", 44100, 2.0)
    at = data.index(b"SSND") + 4
    message = fault_of(data[:at] + struct.pack(">I", 88208) + data[at + 4 :])
    assert message.startswith("holds 1.0 s more than its header counts (1.0 s)")


@pytest.mark.parametrize("tag", [b"", ID3V2])
def test_a_flac_that_holds_more_than_its_header_counts_is_refused(tag):
    flac = made("FLAC", None, 44100, 2.0)
    (counted,) = struct.unpack_from(">Q", flac, 18)
    assert check_audio(tag + flac).samples == counted & (1 << 36) - 1 == 88200
    for samples in (88199, 50000, 4096):
        wrong = flac[:18] + struct.pack(">Q", counted - 88200 + samples) + flac[26:]
        assert fault_of(tag + wrong).startswith(f"holds more than the {samples} samples its header counts")


def crashed(container, subtype="PCM_16"):
    """As its recorder leaves a file that it never closed: sizes of the moment it was opened."""
    data = bytearray(made(container, subtype, 44100))
    at = data.rindex(b"SSND") if container == "AIFF" else data.find(b"data")
    if container in ("WAV", "WAVEX"):
        data[4:8] = data[at + 4 : at + 8] = bytes(4)
    elif container == "AIFF":
        common = data.index(b"COMM")
        data[4:8] = data[at + 4 : at + 8] = data[common + 10 : common + 14] = bytes(4)
    elif container == "AU":
        data[8:12] = bytes(4)
    elif container == "CAF":
        data[at + 4 : at + 12] = bytes(8)
    elif container == "RF64":
        sizes = data.index(b"ds64")
        data[sizes + 8 : sizes + 32] = bytes(24)
    return bytes(data)


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "AIFF", "AU", "CAF", "RF64"])
def test_the_file_of_a_crashed_recorder_is_read_to_its_end(container):
    whole, data = made(container, "PCM_16", 44100), crashed(container)
    assert check_audio(data) == check_audio(whole)
    np.testing.assert_array_equal(decode(data)[0], decode(whole)[0])
    # Cut in the middle of a sample, as a full disk does.
    assert check_audio(data[:-3]).samples == 22049


@pytest.mark.parametrize(
    "sizes",
    [(0, 0), (36, 0), (0, 0xFFFFFFFF), (0xFFFFFFFF, 0), (0xFFFFFFFF, 0xFFFFFFFF), (4, 0), (0x7FFFFFFF, 0x7FFFFFDB)],
)
def test_whatever_a_wav_says_instead_of_its_size_it_is_read_to_its_end(sizes):
    wav = made("WAV", "PCM_16", 44100)
    data = wav[:4] + struct.pack("<I", sizes[0]) + wav[8:40] + struct.pack("<I", sizes[1]) + wav[44:]
    assert check_audio(data).samples == 22050


def test_an_empty_wav_stays_empty_and_a_good_one_as_it_is():
    empty = encode(tone()[:0])
    for data in (empty, empty + chunk(b"LIST", b"INFO"), empty + chunk(b"bext", bytes(603))):
        assert with_sizes_repaired(data) is data
        assert "is empty" in fault_of(data)
    for container in ("WAV", "AIFF", "AU", "CAF", "RF64", "W64", "FLAC", "OGG", "MP3"):
        data = made(container, None, 44100)
        assert with_sizes_repaired(data) is data


def test_a_crashed_recording_is_kept_as_it_came_and_cut_like_any_other(tmp_path):
    data = crashed("WAV")
    source = write_zip(tmp_path / "a.zip", captioned(3) | {"lost.wav": data, "lost.txt": b"found"})
    index = build_shards(str(source), tmp_path / "work")
    clip = next(clip for clip in index.clips if clip.key == "lost")
    shard = (index.directory / clip.shard).read_bytes()
    assert shard[clip.audio_offset : clip.audio_offset + clip.audio_bytes] == data
    whole_CN = load_clip_audio(index, clip, 44100)
    assert torch.equal(load_clip_audio(index, clip, 44100, 5000, 9000), whole_CN[:, 5000:9000])
    np.testing.assert_array_equal(whole_CN.numpy(), decode(made("WAV", "PCM_16", 44100))[0])


def test_joined_files_are_named_also_where_an_earlier_version_took_them_in(tmp_path, monkeypatch):
    joined = made("OGG", "VORBIS", 44100) + made("OGG", "VORBIS", 44100, 1.0)
    source = str(write_zip(tmp_path / "a.zip", captioned(4) | {"j.ogg": joined, "j.txt": b"x"}))
    with monkeypatch.context() as patch:
        for name in ("check_end", "refuse_lost"):
            patch.setattr(f"sa3dist.data.source.audio.{name}", lambda *_: None)
        build_shards(source, tmp_path / "work")
    with pytest.raises(DataError, match="j.ogg: holds 2 streams joined one after the other"):
        build_shards(source, tmp_path / "work")
    index = build_shards(source, tmp_path / "work", on_bad_clip="skip")
    assert [clip.key for clip in index.clips] == [f"clip{n}" for n in range(4)]
    from sa3dist import config

    settings = config.build({"audio_data_url": source, "work_dir": str(tmp_path / "work")})
    report = inspect_source(settings, (380.0, 44100, 4096))
    assert [clip.key for clip in report.clips if clip.treatment == "skipped"] == ["j"]
