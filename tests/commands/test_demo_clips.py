"""Data sets we make ourselves, synthetic or from a folder of recordings: as promised, and fit for the shard stage."""

import zipfile

import numpy as np

from sa3dist.commands.demo import synthesise_clips
from sa3dist.data.source.audio import decode
from sa3dist.data.source.build import build_shards
from tests.helpers.clips import encode, tone, write_folder
from tests.helpers.make_real_dataset import write_dataset


def test_the_demo_clips_are_varied_and_pass_every_check(tmp_path):
    synthesise_clips(tmp_path / "demo.zip")
    clips = build_shards(str(tmp_path / "demo.zip"), tmp_path / "work").clips
    assert len(clips) == 24
    assert {clip.key.split("/")[0] for clip in clips} == {"tone", "chirp", "drum", "noise"}
    for kind in ("tone", "chirp", "drum", "noise"):
        assert len({clip.extension for clip in clips if clip.key.startswith(kind)}) >= 3
    assert {clip.extension for clip in clips} == {"wav", "flac", "ogg", "mp3"}
    assert {clip.sample_rate_hz for clip in clips} == {22050, 32000, 44100, 48000}
    assert {clip.channels for clip in clips} == {1, 2}
    assert round(min(clip.seconds for clip in clips), 1) == 0.5
    assert round(max(clip.seconds for clip in clips), 1) == 12.0
    assert len({clip.caption for clip in clips}) == 24


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthesise_clips(tmp_path / f"{name}.zip", seed=seed, count=8)
    a, b, c = (zipfile.ZipFile(tmp_path / f"{name}.zip") for name in "abc")
    assert a.namelist() == b.namelist()
    for name in a.namelist():
        first, second = a.read(name), b.read(name)
        if name.endswith(".ogg"):
            # libsndfile numbers ogg streams by the clock; the audio inside is the same.
            np.testing.assert_array_equal(decode(first)[0], decode(second)[0])
        else:
            assert first == second, name
    assert a.read("tone/tone_00.wav") != c.read("tone/tone_00.wav")


def test_a_folder_of_recordings_becomes_a_captioned_zip_without_its_bad_files(tmp_path):
    files = {f"Old Jazz/snare_{n:02d}.WAV": encode(tone(hertz=100 + n)) for n in range(4)}
    files |= {"bell.oga": encode(tone(), container="OGG"), "silent.wav": encode(tone(peak=0)), "notes.pdf": b"x"}
    folder = write_folder(tmp_path / "kits", files)
    count, left_out = write_dataset(tmp_path / "real.zip", [folder])
    assert count == 5
    assert [line.split(": ")[0] for line in left_out] == [str(folder / "silent.wav")]
    clips = build_shards(str(tmp_path / "real.zip"), tmp_path / "work").clips
    assert [(clip.key, clip.extension, clip.caption) for clip in clips[-2:]] == [
        ("kits/Old Jazz/snare_03 (WAV)", "wav", "snare 03, Old Jazz"),
        ("kits/bell (oga)", "ogg", "bell, kits"),
    ]
    assert write_dataset(tmp_path / "some.zip", [folder], limit=3)[0] == 3
