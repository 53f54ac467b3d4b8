"""Copies of training clips are named, and what is new is not called a copy."""

import functools
import io
import json
import logging
import time

import numpy as np
import pytest
import soundfile
import torch

from sa3dist.listening import copies
from sa3dist.listening.copy_search import Search, Sound
from sa3dist.listening.copying import View, row_of
from sa3dist.listening.nearest import Match, mel_frames, nearest, windows_of
from sa3dist.listening.previews import Previews
from sa3dist.training import observers
from tests.helpers.clips import encode, write_zip
from tests.helpers.program import rows, run, short_run
from tests.helpers.same_runs import assert_same_training

# A frame of 4096 samples at 44.1 kHz, but for one sample in 1486: twice that is slow to transform.
RATE, FRAME = 16000, 1485


def notes(draw, time_N):
    """Tones of random pitch, begin and decay."""
    out = np.zeros(len(time_N))
    for _ in range(draw.integers(3, 10)):
        begin = draw.integers(len(time_N))
        since = time_N[: len(time_N) - begin]
        out[begin:] += np.sin(2 * np.pi * 110 * 2 ** draw.uniform(0, 4) * since) * np.exp(-since * draw.uniform(1, 8))
    return out


def bursts(draw, time_N):
    """Noise of random colour, in bursts of random place and length."""
    out = np.zeros(len(time_N))
    for _ in range(draw.integers(4, 20)):
        length = int(draw.uniform(0.05, 0.5) * len(time_N) / time_N[-1])
        begin = draw.integers(len(time_N) - length)
        spectrum = np.fft.rfft(draw.standard_normal(length)) * np.arange(1, length // 2 + 2) ** -draw.uniform(0, 1)
        out[begin : begin + length] += np.fft.irfft(spectrum, length) * np.hanning(length) * draw.uniform(1, 5)
    return out


def drums(draw, time_N):
    """A bass drum and a stick of random tempo, pitch and decay."""
    beat = 60 / draw.uniform(70, 170)
    since, stick = time_N % beat, (time_N + beat / 2) % (beat * draw.choice([0.5, 1, 2]))
    body = np.sin(2 * np.pi * draw.uniform(45, 90) * (since - 0.2 * np.exp(-40 * since)))
    noise = draw.standard_normal(len(time_N)) * np.exp(-stick * draw.uniform(20, 200))
    return body * np.exp(-since * draw.uniform(6, 20)) + 0.4 * noise


def make_sound(draw, seconds=5.0, rate=RATE):
    """float32 (2, N), of one of three kinds, with noise 60 dB below."""
    time_N = np.arange(round(seconds * rate)) / rate
    mono = (notes, bursts, drums)[draw.integers(3)](draw, time_N)
    mono = mono / np.abs(mono).max() + 1e-3 * draw.standard_normal(len(time_N))
    return np.stack([mono, mono]).astype(np.float32) * 0.6


def as_ogg(audio_CN, rate=RATE):
    """Encoded and decoded again."""
    return soundfile.read(io.BytesIO(encode(audio_CN.T, rate, "OGG", "VORBIS")), dtype="float32")[0].T


class Clips:
    """What ``Search`` asks of a data set: sounds by number."""

    sample_rate_hz, samples_per_frame = RATE, FRAME

    def __init__(self, trained, held_out):
        self.sounds = dict(enumerate([*trained, *held_out]))
        self.index = self.encoded = self.held_encoded = self
        numbers = [type("Clip", (), {"key": str(number), "number": number})() for number in self.sounds]
        self.clips, self.held_out = numbers[: len(trained)], numbers[len(trained) :]

    def audio(self, clip):
        return torch.from_numpy(self.sounds[clip.number])

    def has_latents(self, clip, flipped):
        return False


def check(trained, held_out, *previews, frames=40):
    """What the row says of each preview."""
    source = Clips(trained, held_out)
    search = Search(source, frames, check=lambda: None)
    sounds = {number: Sound(functools.partial(np.asarray, audio_CN)) for number, audio_CN in enumerate(previews)}
    null = [Sound(functools.partial(search.excerpt, clip)) for clip in source.held_out]
    (row,) = search.rows([copies.Job(7, sounds)], null)
    return row


def test_copies_are_named_and_new_sounds_give_at_most_one_false_alarm_in_twenty_sets():
    alarms = 0
    for seed in range(20):
        draw = np.random.default_rng(seed)
        *sounds, new = [make_sound(draw) for _ in range(23)]
        copied = draw.integers(16)
        begin = round(draw.uniform(0, 1) * RATE)
        # As a preview: 3 dB lower, shifted by 50 ms against whole frames, and through a lossy codec.
        copy = as_ogg(10 ** (-3 / 20) * sounds[copied][:, begin // FRAME * FRAME + RATE // 20 :][:, : 40 * FRAME])
        row = check(sounds[:16], sounds[16:], new, copy)
        assert (row["step"], row["held_out"], row["judged"], row["reason"]) == (7, 6, True, None)
        first, second = row["previews"]
        alarms += first["warning"] is not None
        assert second["clip"] == str(copied)
        assert second["rank"] == round(1 / 7, 4)
        assert second["warning"].startswith(f"preview 1 sounds like {copied} at {second['seconds']} s, nearer than any")
    assert alarms <= 1


def test_a_copy_is_found_where_it_is_also_in_a_part_of_a_preview_and_beyond_a_segment():
    draw = np.random.default_rng(5)
    # Longer than what is transformed at one time.
    trained = [np.concatenate([make_sound(draw) for _ in range(22)], axis=1), make_sound(draw)]
    assert trained[0].shape[1] > 1024 * FRAME
    begin = round(101.3 * RATE)
    preview = np.concatenate([make_sound(draw), trained[0][:, begin : begin + 5 * RATE]], axis=1)
    (found,) = check(trained, [], preview, frames=round(10 * RATE / FRAME))["previews"]
    assert (found["clip"], found["rank"], found["warning"]) == ("0", None, None)
    # One of the windows of the second half.
    assert 101.0 < found["seconds"] < 106.5
    assert found["mel"] < 0.02


def test_the_best_correlation_is_that_of_every_position_looked_at_by_itself():
    draw = np.random.default_rng(2)
    clip = draw.standard_normal((3, 2500)).astype(np.float32).cumsum(axis=1)
    piece = windows_of([draw.standard_normal((3, 11)).astype(np.float32)], 5)
    assert len(piece) == 3
    (found,) = nearest([piece], [("x", clip)])
    windows = np.lib.stride_tricks.sliding_window_view(clip.astype(np.float64), 5, axis=1).transpose(1, 0, 2)
    windows = (windows - windows.mean(axis=(1, 2), keepdims=True)).reshape(len(windows), -1)
    spread = np.linalg.norm(windows, axis=1)
    values = windows @ piece.reshape(3, -1).T.astype(np.float64) / spread[:, None]
    # What hardly moves is not compared.
    values[spread < 0.05 * clip.std() * 15**0.5] = 0
    assert found.distance == pytest.approx(1 - values.max(), abs=1e-4)
    assert found.frame == values.max(axis=1).argmax()


def test_level_does_not_count_in_mel_frames_and_silence_is_nobodys_copy():
    draw = np.random.default_rng(3)
    loud = make_sound(draw)
    np.testing.assert_allclose(mel_frames(loud, RATE, FRAME) - 20, mel_frames(0.1 * loud, RATE, FRAME), atol=0.05)
    row = check([loud], [make_sound(draw) for _ in range(4)], np.zeros((2, 40 * FRAME), np.float32))
    assert {row["previews"][0][key] for key in ("clip", "seconds", "mel", "rank", "warning")} == {None}


@pytest.mark.parametrize(("held_out", "judged"), [(0, False), (3, False), (4, True)])
def test_with_fewer_than_four_held_out_clips_copying_cannot_be_judged(held_out, judged):
    views = {"mel": View([0.5] * held_out, [Match(0.01, "a", 20)])}
    row = row_of(3, [0], views, held_out, 0.1)
    assert row["judged"] is judged
    assert (row["reason"] is None) is judged
    if not judged:
        assert (
            row["reason"]
            == {
                0: "copying cannot be judged: no clip is held out; set validation=0.1",
                3: "copying cannot be judged: 3 clips held out, at least 4 are needed; raise validation",
            }[held_out]
        )
    (found,) = row["previews"]
    assert (found["clip"], found["seconds"], found["mel"]) == ("a", 2.0, 0.01)
    assert (found["warning"] is not None) is judged


def test_mel_frames_decide_and_latents_do_where_there_is_no_audio():
    far, near = View([0.4] * 5, [Match(0.3, "a", 0)]), View([0.4] * 5, [Match(0.1, "b", 0)])
    (found,) = row_of(0, [2], {"mel": far, "latent": near}, 5, 0.1)["previews"]
    assert (found["number"], found["clip"], found["mel"], found["latent"]) == (2, "a", 0.3, 0.1)
    # Nearer than all, but not by the margin: that happens by chance.
    assert (found["rank"], found["warning"]) == (round(1 / 6, 4), None)
    (found,) = row_of(0, [2], {"latent": near}, 5, 0.1)["previews"]
    assert found["mel"] is None
    assert found["warning"].startswith("preview 2 sounds like b at 0.0 s")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A zip of sixteen clips of 3 s, and the clips: float32 (2, N) at 44.1 kHz by name."""
    draw, rate = np.random.default_rng(4), 44100
    clips = {f"sound_{number:02d}": make_sound(draw, 3.0, rate) for number in range(16)}
    members = {f"{name}.wav": encode(audio_CN.T, rate) for name, audio_CN in clips.items()}
    members |= {f"{name}.txt": f"the {name}".encode() for name in clips}
    return write_zip(tmp_path_factory.mktemp("sounds") / "sounds.zip", members), clips


@pytest.fixture
def words(data, demo_base, demo_work):
    on = ["preview_every=2", "preview_seconds=1.5", "preview_steps=1", "preview_cfg=1", "preview_prompts=[a,b]"]
    return [*short_run(data[0], demo_base, demo_work), *on, "number_of_steps=2", "save_every=2"]


def found_in(output_dir):
    return [json.loads(line) for line in (output_dir / "copies.jsonl").read_text().splitlines()]


def test_a_preview_of_a_run_that_is_a_copy_is_named_and_the_training_is_as_without_the_check(
    words, data, tmp_path, monkeypatch, caplog
):
    names = [f"sound_{number:02d}" for number in range(5)]
    said = words + [f"validation=[{','.join(names)}]"]
    copied = data[1]["sound_11"]
    write = Previews._write

    def plant(previews, step, number, audio_CN):
        # The second preview after training is a clip, from an odd place on.
        if (step, number) == (2, 1):
            begin = round(0.55 * 44100)
            audio_CN = torch.from_numpy(as_ogg(0.7 * copied[:, begin : begin + audio_CN.shape[1]], 44100))
        write(previews, step, number, audio_CN)

    monkeypatch.setattr(Previews, "_write", plant)
    with caplog.at_level(logging.WARNING):
        assert run(said, tmp_path / "run") == 0
    first, second = found_in(tmp_path / "run")
    assert [(row["step"], row["held_out"], row["judged"]) for row in (first, second)] == [(0, 5, True), (2, 5, True)]
    assert all(preview["warning"] is None for preview in first["previews"])
    copy = second["previews"][1]
    assert (copy["number"], copy["clip"], copy["rank"]) == (1, "sound_11", round(1 / 6, 4))
    # What the test planted begins at 0.55 s, and its windows end 3 s later at the latest.
    assert 0.4 < copy["seconds"] < 3
    assert copy["mel"] < 0.1
    assert 0 <= copy["latent"] < 1
    assert "step 2: preview 1 sounds like sound_11 at" in caplog.text
    assert any(row.get("copies_seconds", 0) > 0 for row in rows(tmp_path / "run"))
    assert run(said, tmp_path / "off", "copy_check=false") == 0
    assert not (tmp_path / "off/copies.jsonl").exists()
    assert_same_training(tmp_path / "run", tmp_path / "off")


def test_of_a_data_set_of_latents_alone_latents_say_what_is_near(data, demo_base, tmp_path, monkeypatch):
    names = [f"sound_{number:02d}" for number in range(8)]
    members = {f"{name}.wav": encode(data[1][name].T, 44100) for name in names}
    members |= {f"{name}.txt": b"a sound" for name in names}
    work = tmp_path / "work"
    words = [*short_run(write_zip(tmp_path / "few.zip", members), demo_base, work), "number_of_steps=1"]
    assert run(words, tmp_path / "encoding", "pre_encode=true") == 0
    (shards,) = (work / "latent_shards").iterdir()
    write = Previews._write

    def plant(previews, step, number, audio_CN):
        begin = 5 * 4096
        audio_CN = torch.from_numpy(data[1]["sound_06"][:, begin : begin + audio_CN.shape[1]])
        write(previews, step, number, audio_CN)

    monkeypatch.setattr(Previews, "_write", plant)
    on = ["preview_every=1", "preview_seconds=1.5", "preview_steps=1", "preview_cfg=1", "preview_prompts=[a]"]
    held_out = f"validation=[{','.join(names[:4])}]"
    assert run(words, tmp_path / "run", *on, held_out, "validation_every=0", f"audio_data_url={shards}") == 0
    row = found_in(tmp_path / "run")[-1]
    assert (row["held_out"], row["judged"]) == (4, True)
    (preview,) = row["previews"]
    assert (preview["clip"], preview["mel"], preview["rank"]) == ("sound_06", None, 0.2)
    assert preview["latent"] < 0.2
    assert preview["seconds"] == pytest.approx(5 * 4096 / 44100, abs=0.1)


def test_without_held_out_clips_the_nearest_is_named_and_a_failure_is_said_once(words, tmp_path, monkeypatch, caplog):
    assert run(words, tmp_path / "run", "latents=crop") == 0
    first, second = found_in(tmp_path / "run")
    assert first["reason"] == "copying cannot be judged: no clip is held out; set validation=0.1"
    assert second["previews"][0]["clip"].startswith("sound_")
    # Crops are encoded one by one: there are no latents of whole clips.
    assert {preview["latent"] for preview in second["previews"]} == {None}

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(copies, "read_preview", broken)
    assert run(words, tmp_path / "broken") == 0
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("copies")]
    assert said == [
        "copies: check failed: OSError: [Errno 5] Input/output error; training goes on, further failures are not logged"
    ]


def test_a_search_that_does_not_end_is_given_up_with_the_run(words, tmp_path, monkeypatch, caplog):
    def endless(search, *_):
        while True:
            search.check()
            time.sleep(0.01)

    monkeypatch.setattr(observers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(Search, "_by_mel", endless)
    assert run(words, tmp_path / "run") == 0
    assert "copies: not searched for to the end, the run is over before" in caplog.text
    assert found_in(tmp_path / "run") == []
