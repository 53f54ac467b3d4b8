"""A clip that was measured once is not decoded again by the next look or by the shards; damage is never believed."""

import zipfile

import numpy as np
import pytest

from sa3dist import config
from sa3dist.commands.demo import synthesise_clips
from sa3dist.data.source import build, check, clip_stats
from sa3dist.errors import DataError
from sa3dist.inspection import measure
from sa3dist.inspection.report import inspect_source

FRAMING = (380.0, 44100, 4096)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clips.zip"
    synthesise_clips(path, seed=4, count=6)
    return path


@pytest.fixture
def decoded(monkeypatch):
    """Lengths of the files that are decoded from here on."""
    lengths = []
    for module in (measure, check):

        def count(data, *observers, original=module.check_audio):
            lengths.append(len(data))
            return original(data, *observers)

        monkeypatch.setattr(module, "check_audio", count)
    return lengths


def look(source, work_dir):
    return inspect_source(config.build({"audio_data_url": str(source), "work_dir": str(work_dir)}), FRAMING)


def pictures(report):
    return [clip.stats.spectrogram_SP for clip in report.clips]


def test_a_second_look_and_the_shards_decode_nothing_and_say_the_same(source, tmp_path, decoded):
    first = look(source, tmp_path / "work")
    assert len(decoded) == 6
    second = look(source, tmp_path / "work")
    assert len(decoded) == 6
    assert second.as_dict() == first.as_dict()
    assert all(np.array_equal(a, b) for a, b in zip(pictures(first), pictures(second), strict=True))
    index = build.build_shards(str(source), tmp_path / "work")
    assert len(decoded) == 6
    straight = build.build_shards(str(source), tmp_path / "other")
    assert len(decoded) == 12
    assert [path.read_bytes() for path in sorted(index.directory.iterdir())] == [
        path.read_bytes() for path in sorted(straight.directory.iterdir())
    ]


def test_shards_that_measure_leave_nothing_to_decode_for_a_look_and_are_the_same(source, tmp_path, decoded):
    index = build.build_shards(str(source), tmp_path / "work", measure=measure.measure_clip)
    assert len(decoded) == 6
    report = look(source, tmp_path / "work")
    assert len(decoded) == 6
    looked_first = look(source, tmp_path / "other")
    assert report.as_dict() == looked_first.as_dict()
    assert all(np.array_equal(a, b) for a, b in zip(pictures(report), pictures(looked_first), strict=True))
    unmeasured = build.build_shards(str(source), tmp_path / "third")
    assert not (tmp_path / "third" / clip_stats.NAME).exists()
    for name in (path.name for path in index.directory.iterdir()):
        assert (index.directory / name).read_bytes() == (unmeasured.directory / name).read_bytes()


def test_shards_measure_only_what_they_decode_and_keep_what_was_known(source, tmp_path, decoded):
    fewer = tmp_path / "fewer.zip"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(fewer, "w") as out:
        for name in sorted(whole.namelist())[:8]:
            out.writestr(name, whole.read(name))
    look(fewer, tmp_path / "work")
    build.build_shards(str(source), tmp_path / "work", measure=measure.measure_clip)
    assert len(decoded) == 6
    assert len(clip_stats.read_stats(tmp_path / "work")) == 6


def test_a_source_that_is_refused_leaves_no_figures(source, tmp_path):
    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(damaged, "w") as out:
        for name in whole.namelist():
            out.writestr(name, whole.read(name))
        out.writestr("cut.wav", b"RIFF")
        out.writestr("cut.txt", "a beat")
    with pytest.raises(DataError, match="cut.wav"):
        build.build_shards(str(damaged), tmp_path / "work", measure=measure.measure_clip)
    assert not (tmp_path / "work" / clip_stats.NAME).exists()


def test_sets_too_large_for_it_are_not_measured(source, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "MAX_MEASURED_CLIPS", 5)
    build.build_shards(str(source), tmp_path / "work", measure=measure.measure_clip)
    assert not (tmp_path / "work" / clip_stats.NAME).exists()


def test_a_new_clip_is_measured_beside_the_known_ones(source, tmp_path, decoded):
    fewer = tmp_path / "fewer.zip"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(fewer, "w") as out:
        names = sorted(whole.namelist())
        for name in names[: len(names) - 2]:
            out.writestr(name, whole.read(name))
    look(fewer, tmp_path / "work")
    report = look(source, tmp_path / "work")
    assert len(decoded) == 6
    assert report.as_dict() == look(source, tmp_path / "another").as_dict()


def test_what_was_measured_before_an_interruption_is_kept(source, tmp_path, decoded):
    def interrupt(done, total):
        if done == 4:
            raise KeyboardInterrupt

    settings = config.build({"audio_data_url": str(source), "work_dir": str(tmp_path / "work")})
    with pytest.raises(KeyboardInterrupt):
        inspect_source(settings, FRAMING, interrupt)
    decoded.clear()
    look(source, tmp_path / "work")
    assert len(decoded) == 2


def test_a_flipped_byte_anywhere_changes_no_figure(source, tmp_path):
    expected = look(source, tmp_path / "work")
    path = tmp_path / "work" / clip_stats.NAME
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 40).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        kept = clip_stats.read_stats(tmp_path / "work")
        assert set(kept) in (set(), {(clip.audio_sha256, clip.bytes) for clip in expected.clips})
        for clip in expected.clips:
            if kept:
                facts, found = kept[clip.audio_sha256, clip.bytes]
                assert (facts, found.lufs) == (clip.facts, clip.stats.lufs)
                assert np.array_equal(found.spectrogram_SP, clip.stats.spectrogram_SP)
                assert np.array_equal(found.fingerprint, clip.stats.fingerprint)


def test_a_disk_that_takes_no_figures_is_said_and_harms_nothing(source, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    report = look(source, tmp_path / "file" / "work")
    assert len(report.usable) == 6
    assert "cannot store the statistics" in caplog.text


def test_a_clip_that_changed_since_is_decoded_anew(source, tmp_path, decoded):
    folder = tmp_path / "folder"
    with zipfile.ZipFile(source) as archive:
        archive.extractall(folder)
    look(folder, tmp_path / "work")
    victim = next(folder.rglob("*.wav"))
    data = victim.read_bytes()
    victim.write_bytes(data[:-100] + bytes(100))
    decoded.clear()
    build.build_shards(str(folder), tmp_path / "work")
    assert decoded == [len(data)]
