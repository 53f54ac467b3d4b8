"""Inspecting a data set: the figures are the standards', duplicates are found, and nothing is hidden or executed."""

import base64
import io
import json
import math
import re

import numpy as np
import pytest
import rich.console
import soundfile
import torch

from sa3dist import cli, config
from sa3dist.commands.demo import synthesise_clips
from sa3dist.data.source.audio import check_audio, decode
from sa3dist.data.source.resample import resample
from sa3dist.inspection.duplicates import NEAR_DUPLICATE_DB
from sa3dist.inspection.html import page_of
from sa3dist.inspection.loudness import integrated_loudness, k_weighting
from sa3dist.inspection.measure import Measurement, fingerprint_distance_db
from sa3dist.inspection.png import png
from sa3dist.inspection.report import inspect_source
from sa3dist.model.loading import known_config
from tests.helpers.clips import captioned, encode, tone, write_folder, write_zip
from tests.helpers.pages import Elements

FRAMING = (380.0, 44100, 4096)


def measure(samples_NC, rate, block=1 << 18):
    measurement = Measurement()
    for start in range(0, len(samples_NC), block):
        measurement(samples_NC[start : start + block].astype(np.float32), rate)
    return measurement.finish()


def inspect(source, tmp_path, **values):
    settings = config.build({"audio_data_url": str(source), "work_dir": str(tmp_path / "work"), **values})
    return inspect_source(settings, FRAMING)


def test_the_k_weighting_at_48_khz_is_the_standards_table():
    # ITU-R BS.1770-4, tables 1 and 2.
    (shelf_b, shelf_a), (pass_b, pass_a) = k_weighting(48000)
    np.testing.assert_allclose(shelf_b, [1.53512485958697, -2.69169618940638, 1.19839281085285], rtol=1e-9)
    np.testing.assert_allclose(shelf_a, [1, -1.69065929318241, 0.73248077421585], rtol=1e-9)
    np.testing.assert_allclose(pass_b, [1, -2, 1])
    np.testing.assert_allclose(pass_a, [1, -1.99004745483398, 0.99007225036621], rtol=1e-9)


@pytest.mark.parametrize("rate", [22050, 44100, 48000, 96000])
def test_a_full_scale_sine_in_one_channel_has_the_loudness_the_standard_says(rate):
    samples = tone(5.0, rate, channels=1, hertz=997.0, peak=1.0)
    assert measure(samples, rate).lufs == pytest.approx(-3.01, abs=0.05)
    both = np.repeat(samples, 2, axis=1)
    assert measure(both, rate).lufs == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("block", [1000, 4800, 100_000])
def test_loudness_equals_the_standards_filters_in_float64_however_it_is_cut(block):
    import scipy.signal

    rng = np.random.default_rng(3)
    samples = rng.standard_normal((48000 * 6 + 1234, 2)) * 0.1
    # A quiet second half that the relative gate must leave out, and a silent end for the absolute one.
    samples[150_000:] *= 0.01
    samples[250_000:] = 0
    weighted = samples
    for b, a in k_weighting(48000):
        weighted = scipy.signal.lfilter(b, a, weighted, axis=0)
    whole = len(samples) // 4800 * 4800
    powers = (weighted[:whole].reshape(-1, 4800, 2) ** 2).mean(axis=1).sum(axis=1)
    blocks = np.array([powers[i : i + 4].mean() for i in range(len(powers) - 3)])
    blocks = blocks[-0.691 + 10 * np.log10(blocks + 1e-300) > -70]
    blocks = blocks[10 * np.log10(blocks) > 10 * np.log10(blocks.mean()) - 10]
    expected = -0.691 + 10 * math.log10(blocks.mean())
    assert measure(samples, 48000, block).lufs == pytest.approx(expected, abs=2e-3)


def test_silence_is_minus_infinity_and_a_clip_below_400_ms_is_not_gated():
    assert integrated_loudness(np.zeros(20)) == -math.inf
    assert measure(tone(0.3, 48000, hertz=997.0, peak=1.0), 48000).lufs == pytest.approx(-3.0, abs=0.1)


def test_silence_and_clipping_are_counted():
    samples = np.concatenate([np.zeros((44100, 1)), tone(2.0, peak=0.5), np.zeros((22050, 1))])
    figures = measure(samples, 44100)
    assert figures.lead_seconds == pytest.approx(1.0, abs=0.05)
    assert figures.tail_seconds == pytest.approx(0.5, abs=0.05)
    assert figures.silent_share == pytest.approx(15 / 35, abs=0.03)
    assert figures.peak_dbfs == pytest.approx(20 * math.log10(0.5), abs=0.01)
    assert figures.clipped_samples == 0
    loud = np.clip(tone(1.0, hertz=100.0, peak=2.0), -1, 1)
    flat = np.abs(loud[:, 0]) == 1
    assert measure(loud, 44100).clipped_samples == (flat[:-2] & flat[1:-1] & flat[2:]).sum() > 1000


def _copies(data):
    samples_CN, rate = decode(data)
    for container, subtype, new_rate, gain in [
        ("MP3", None, 44100, 0.9),
        ("OGG", "VORBIS", rate, 0.4),
        ("WAV", "PCM_16", 22050, 0.8),
        ("FLAC", "PCM_16", 48000, 0.3),
    ]:
        copy = resample(torch.from_numpy(samples_CN), rate, new_rate).numpy().T * gain
        out = io.BytesIO()
        soundfile.write(out, copy, new_rate, format=container, subtype=subtype)
        yield f"{container.lower()}", out.getvalue()


def test_copies_in_other_formats_are_found_and_different_clips_are_not(tmp_path):
    synthesise_clips(tmp_path / "a.zip", seed=5, count=16)
    assert inspect(tmp_path / "a.zip", tmp_path).near == []
    rng = np.random.default_rng(0)
    originals = [rng.standard_normal((66150, 1)) * np.exp(-np.arange(66150) / n)[:, None] / 8 for n in (9e3, 3e4, 9e9)]
    members, expected = {}, set()
    for number, samples in enumerate(originals):
        data = encode(samples.astype(np.float32))
        members |= {f"{number}-0.wav": data, f"{number}-0.txt": b"noise"}
        for extension, copy in _copies(data):
            members |= {f"{number}-{extension}.{extension}": copy, f"{number}-{extension}.txt": b"noise"}
            expected.add((f"{number}-0", f"{number}-{extension}"))
    report = inspect(write_zip(tmp_path / "b.zip", members), tmp_path)
    found = {tuple(sorted(pair[:2])) for pair in report.near}
    assert expected <= found
    # Copies of one recording are copies of each other; of different noises none is.
    assert all(one.split("-")[0] == other.split("-")[0] for one, other in found)
    assert all(distance < NEAR_DUPLICATE_DB for *_, distance in report.near)


def test_two_noises_of_one_colour_and_length_are_not_one():
    rng = np.random.default_rng(1)
    one, other = (measure(rng.standard_normal((88200, 1)) * 0.1, 44100).fingerprint for _ in range(2))
    assert fingerprint_distance_db(one, other) > NEAR_DUPLICATE_DB


def test_every_clip_has_its_treatment_and_every_fault_its_reason(tmp_path):
    members = {f"{seconds}.wav": encode(tone(seconds)) for seconds in (1.0, 2.0, 3.0)}
    members |= {f"{seconds}.txt": b"a tone" for seconds in (1.0, 2.0, 3.0)}
    members |= {"copy.wav": members["2.0.wav"], "copy.txt": b"again", "mute.wav": encode(np.zeros((9000, 1)))}
    members |= {"mute.txt": b"nothing", "orphan.wav": encode(tone()), "junk.ogg": b"junk", "junk.txt": b"junk"}
    exactly = encode(tone(2 * 4096 * 10 / 44100))
    members |= {"exact.wav": exactly, "exact.txt": b"twenty frames"}
    # A hundredth of a second more than twenty frames, less than one.
    members |= {
        "more.wav": encode(0.1 * np.random.default_rng(2).standard_normal((20 * 4096 + 441, 1))),
        "more.txt": b"twenty frames and a bit",
    }
    report = inspect(write_folder(tmp_path / "in", members), tmp_path, duration=20 * 4096 / 44100)
    clips = {clip.key: clip for clip in report.clips}
    assert {key: clip.treatment for key, clip in clips.items()} == {
        "1.0": "padded",
        "2.0": "cropped",
        "3.0": "cropped",
        "copy": "cropped",
        "exact": "whole",
        "junk": "skipped",
        "more": "whole",
        "mute": "skipped",
        "orphan": "skipped",
    }
    assert (clips["exact"].reason, clips["more"].reason) == ("all of it", "all of it but less than a frame, 0.093 s")
    assert "is silent" in clips["mute"].reason
    assert "cannot be decoded" in clips["junk"].reason
    assert "audio without a caption" in clips["orphan"].reason
    assert sorted(report.exact[0]) == ["2.0", "copy"]
    assert report.near == []
    assert report.verdict == ["3 clips cannot be used; fix them, or set on_bad_clip: skip"]
    summary = report.summary()
    assert (summary["clips"], summary["usable"]) == (9, 6)
    assert summary["captions"]["distinct"] == 4
    assert sum(summary["length_histogram"]["clips"]) == 6
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["figures.safetensors"]


def test_too_few_clips_are_said_to_stop_training(tmp_path):
    source = write_zip(tmp_path / "a.zip", captioned(3))
    assert inspect(source, tmp_path).verdict[0].startswith("found 3 usable clips, expected 4 to 2000")
    assert inspect(source, tmp_path, allow_any_dataset_size=True).verdict == []


def test_json_is_complete_and_the_command_says_when_a_source_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = captioned(4) | {"bad.wav": b"x", "bad.txt": b"x"}
    source = write_zip(tmp_path / "a.zip", members)
    assert cli.main(["inspect", str(source), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [clip["key"] for clip in value["clips"]] == ["bad", "clip0", "clip1", "clip2", "clip3"]
    facts = check_audio(members["clip0.wav"])
    assert (value["clips"][1]["samples"], value["clips"][1]["channels"]) == (facts.samples, 1)
    assert cli.main(["inspect", str(tmp_path / "none.zip")]) == 2
    assert "none.zip: no such file or folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_the_terminal_shows_every_clip_by_its_whole_name_however_narrow(tmp_path, capsys, monkeypatch):
    name = "[b]take " + "a-long-name-" * 12
    members = captioned(4) | {f"{name}.wav": encode(tone(1.5)), f"{name}.txt": b"a tone"}
    source = write_zip(tmp_path / "a.zip", members)
    assert cli.main(["inspect", str(source)]) == 0
    piped = capsys.readouterr().out
    assert all(word in piped for word in ("clip0", "44100", "padded", "LUFS", str(source)))
    # Through a pipe a clip is one line.
    (line,) = [line for line in piped.splitlines() if name in line]
    assert line.split()[-1] == "whole"
    monkeypatch.setattr(rich.console.Console, "is_terminal", True)
    for columns in (80, 30):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli.main(["inspect", str(source)]) == 0
        lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
        start = next(n for n, line in enumerate(lines) if line.strip().startswith("[b]"))
        end = next(n for n, line in enumerate(lines) if line.strip().startswith("clip0"))
        found = lines[start:end] if start < end else lines[start:]
        wide = found[0].index("1.50")
        assert name.replace(" ", "") in "".join(line[:wide] for line in found).replace(" ", "")
        assert all(figure in found[0] for figure in ("1.50", "44100", "whole"))


def test_a_page_that_is_full_says_how_many_clips_have_no_player_and_grows_no_further(tmp_path):
    members, rng = {}, np.random.default_rng(0)
    for number in range(8):
        noise_N1 = 0.1 * rng.standard_normal((44100 * (1 + number), 1))
        members |= {f"{number}.wav": encode(noise_N1), f"{number}.txt": b"noise"}
    source = write_zip(tmp_path / "a.zip", members)
    for megabytes in (20.0, 0.2):
        page = tmp_path / f"{megabytes}.html"
        assert cli.main(["inspect", str(source), "--html", str(page), "--megabytes", str(megabytes)]) == 0
        text = page.read_text()
        held = re.findall(r"audio/ogg;base64,([^\"]+)", text)
        lengths = [soundfile.info(io.BytesIO(base64.b64decode(sound))).duration for sound in held]
        if megabytes == 20.0:
            assert lengths == pytest.approx([1.0 + number for number in range(8)], abs=0.01)
            assert "without a player" not in text
        else:
            assert page.stat().st_size < 0.2e6
            assert 0 < len(lengths) < 8
            assert max(lengths) <= 5
            assert f"{8 - len(lengths)} clips of 8 without a player" in text
    for megabytes in ("0", "-1", "nan", "inf"):
        assert cli.main(["inspect", str(source), "--html", str(page), f"--megabytes={megabytes}"]) == 2


def test_the_page_shows_what_strangers_wrote_as_text_and_loads_nothing(tmp_path):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    caption = hostile + " ".join(f"word{n}" for n in range(900))
    members = captioned(4) | {"[b]x.wav": encode(tone(1.5)), "[b]x.txt": caption.encode(), "song.m4a": b""}
    page = page_of(inspect(write_zip(tmp_path / "a.zip", members), tmp_path))
    elements = Elements(page)
    # The charts, the library that draws them, and the page's own.
    assert len(elements.of("script")) == 3
    assert not [name for _, found in elements.tags for name in found if name.startswith("on")]
    assert caption in "".join(elements.words)
    pictures = [found["src"] for found in elements.of("img")]
    assert len(pictures) == 5
    assert all(base64.b64decode(picture.partition(",")[2]).startswith(b"\x89PNG") for picture in pictures)
    assert "left out: 1 m4a file (song.m4a)" in page


def test_histograms_count_every_clip_between_their_edges(tmp_path):
    members = {}
    for number, seconds in enumerate([0.5] * 5 + [1.0] * 2 + [2.0]):
        members |= {f"{number}.wav": encode(tone(seconds, hertz=300 + 50 * number, peak=0.1 + 0.05 * number))}
        members |= {f"{number}.txt": b"a tone"}
    report = inspect(write_zip(tmp_path / "a.zip", members), tmp_path)
    charts = Elements(page_of(report)).charts()
    lengths, loudness = charts["lengths"], charts["loudness"]
    counts = lengths["series"][0]["y"]
    assert (lengths["edges"][0], lengths["edges"][-1]) == (0, 2)
    assert {round(edge, 6): count for edge, count in zip(lengths["edges"], counts, strict=False) if count} == {
        0.5: 5,
        1.0: 2,
        1.9: 1,
    }
    assert sum(loudness["series"][0]["y"]) == 8
    values = [clip.stats.lufs for clip in report.clips]
    assert (loudness["edges"][0], loudness["edges"][-1]) == (min(values), max(values))


def test_pictures_are_valid_png():
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(6 * 5, dtype=np.uint8).reshape(6, 5) * 8
    with image.open(io.BytesIO(png(pixels))) as opened:
        assert np.array_equal(np.asarray(opened), pixels)


def test_a_report_without_a_usable_clip_still_renders(tmp_path):
    report = inspect(write_zip(tmp_path / "a.zip", {"a.wav": b"x", "a.txt": b"x"}), tmp_path)
    assert "0 of 1 clip usable" in page_of(report)
    assert report.as_dict()["summary"]["usable"] == 0


def test_the_released_bases_frame_as_published():
    for name, seconds in (("medium-base", 380.0), ("small-music-base", 120.0)):
        base = known_config(name)
        assert (base.native_seconds, base.sample_rate_hz, base.samples_per_frame) == (seconds, 44100, 4096)
