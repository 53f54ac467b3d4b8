"""Trackers: what they hold after a run, and that one that fails or hangs changes neither its course nor its end."""

import importlib
import io
import json
import os
import subprocess
import sys
import time

import pytest
import soundfile

from sa3dist import config
from sa3dist.data.source.run_outputs import is_output_dir, list_disk
from sa3dist.errors import ConfigError
from sa3dist.tracking import background, kinds
from sa3dist.training import observers
from tests.helpers.program import ENVIRONMENT, STEPS, rows, run, short_run
from tests.helpers.same_runs import assert_same_training

PREVIEWS = ["preview_every=4", "preview_seconds=0.6", "preview_steps=2"]


class Raising(kinds.Tracker):
    """Takes its settings, and then nothing."""

    modules = ()

    def __init__(self, run):
        assert run.settings["rank"] == 4

    def log(self, step, values):
        raise ConnectionError(f"no route to the server at step {step}")

    def log_preview(self, step, preview):
        raise SystemExit("not logged in")

    def finish(self):
        raise ConnectionError("no route to the server")


class Hanging(Raising):
    """Never comes back from its first call."""

    def __init__(self, run):
        time.sleep(3600)


class Remembering(Raising):
    """Keeps what it was given."""

    taken: list = []

    def log(self, step, values):
        self.taken.append((step, values))

    def log_preview(self, step, preview):
        self.taken.append((step, preview))

    def finish(self):
        self.taken.append("finished")


def package(name):
    """A tracker's package. Without it the test is skipped, or fails where SA3_REQUIRE_TOOLS=1 asks for all of them."""
    return importlib.import_module(name) if os.environ.get("SA3_REQUIRE_TOOLS") == "1" else pytest.importorskip(name)


@pytest.fixture
def short_words(demo_clips, demo_base, demo_work):
    return short_run(demo_clips, demo_base, demo_work)


@pytest.fixture
def kinds_of_test(monkeypatch):
    monkeypatch.setattr(Remembering, "taken", [])
    for kind in (Raising, Hanging, Remembering):
        monkeypatch.setitem(kinds.TRACKERS, kind.__name__.lower(), kind)


def untracked(words, tmp_path):
    assert run(words, tmp_path / "untracked", *PREVIEWS) == 0
    return tmp_path / "untracked"


def test_trackers_that_fail_and_hang_change_no_bit_and_end_nothing_and_one_beside_them_gets_everything(
    short_words, kinds_of_test, tmp_path, monkeypatch, caplog
):
    plain = untracked(short_words, tmp_path)
    monkeypatch.setattr(observers, "CLOSE_SECONDS", 1.0)
    tracked = tmp_path / "tracked"
    begin = time.monotonic()
    with caplog.at_level("WARNING", logger="sa3dist"):
        assert run(short_words, tracked, *PREVIEWS, "log_with=[raising, hanging, remembering]") == 0
    assert time.monotonic() - begin < 60
    assert_same_training(plain, tracked)
    for name, reason in {"raising": "not logged in", "hanging": "did not take everything"}.items():
        (line,) = [record.message for record in caplog.records if f"tracker {name}:" in record.message]
        assert reason in line
        assert "metrics.jsonl has every row" in line
    assert not [record for record in caplog.records if "tracker remembering" in record.message]
    *taken, last = Remembering.taken
    assert last == "finished"
    found = [(step, values) for step, values in taken if isinstance(values, dict)]
    assert [(step, values["train/loss"]) for step, values in found] == [
        (row["step"], row["loss"]) for row in rows(tracked)
    ]
    heard = [(step, given.number) for step, given in taken if isinstance(given, kinds.Preview)]
    assert heard == [(step, number) for step in (0, 4, STEPS) for number in range(4)]


def test_a_process_ends_with_0_though_a_tracker_hangs_in_its_calls_and_as_the_process_ends(short_words, tmp_path):
    program = """
import atexit, time
from sa3dist import train
from sa3dist.runtime import own_process
from sa3dist.tracking import kinds
from sa3dist.training import observers

class Hanging(kinds.Tracker):
    modules = ()
    def __init__(self, run):
        atexit.register(time.sleep, 3600)
        time.sleep(3600)

kinds.TRACKERS["hanging"] = Hanging
observers.CLOSE_SECONDS = own_process.EXIT_FUNCTIONS_SECONDS = 1.0
train.as_process(train.main)
"""
    words = [*short_words, f"output_dir={tmp_path / 'run'}", "log_with=hanging"]
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["lora_file"]
    assert ended.stderr.count("tracker hanging:") == 1
    assert len(rows(tmp_path / "run")) == STEPS


def test_a_queue_that_is_full_takes_no_more_and_never_waits(kinds_of_test, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(background, "MAX_QUEUED", 3)
    thread = background._TrackerThread("slow", lambda: time.sleep(3600))
    begin = time.monotonic()
    with caplog.at_level("WARNING", logger="sa3dist"):
        for _ in range(100):
            thread.put(lambda tracker: None)
        thread.end()
        thread.join(time.monotonic() + 0.1)
    assert time.monotonic() - begin < 5
    assert [record.message for record in caplog.records] == [
        "tracker slow: does not keep up: 3 rows wait for it; training goes on, metrics.jsonl has every row"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [("neptune", "log_with: 'neptune' is no tracker; choose from tensorboard, "), ("absent", "sa3dist[absent]")],
)
def test_a_tracker_that_is_unknown_or_missing_is_one_line_and_2_before_anything_is_prepared(
    short_words, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.setitem(kinds.TRACKERS, "absent", type("Absent", (Raising,), {"modules": ("sa3dist_no_such_package",)}))
    work = tmp_path / "work"
    assert run(short_words, tmp_path / "run", f"work_dir={work}", f"log_with={words}") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "log_with" in line]
    assert message in line
    assert not work.exists()
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_names_follow_the_conventions_of_trainers():
    row = {"step": 20, "loss": 0.5, "lr": 1e-4, "grad_norm": 2.0, "val/loss_0.5": 0.7, "clips_seen": 80}
    row |= {"step_seconds": 0.5, "data_wait": 0.1, "startup_seconds": {"base": 2.0}, "clips": ["a"], "resumed_from": 10}
    assert background.tags(row) == {
        "train/loss": 0.5,
        "train/lr": 1e-4,
        "train/grad_norm": 2.0,
        "train/clips_seen": 80,
        "val/loss_0.5": 0.7,
        "perf/step_seconds": 0.5,
        "perf/data_wait": 0.1,
        "perf/startup_seconds/base": 2.0,
        "perf/clips_per_second": 8.0,
    }


@pytest.mark.parametrize("text", ["tensorboard,wandb", "[tensorboard, wandb]"])
def test_several_are_named_in_one_word_or_as_a_list(text):
    words = {}
    config.read_arguments(["audio_data_url=clips.zip", f"log_with={text}"], words)
    assert list(kinds.chosen(config.build(words).log_with)) == ["tensorboard", "wandb"]
    with pytest.raises(ConfigError, match="is no tracker"):
        kinds.chosen(["tensorboard", ""])


def test_a_fresh_start_is_a_new_run_and_one_that_continues_the_same(tmp_path):
    first = background._run_id(tmp_path, None)
    assert background._run_id(tmp_path, 4) == first
    assert background._run_id(tmp_path, None) != first
    assert json.loads((tmp_path / "trackers.json").read_text())["id"] != first


def test_tensorboard_reads_curves_and_previews_back_and_drops_what_a_resume_takes_back(short_words, tmp_path):
    package("tensorboard")
    accumulator = package("tensorboard.backend.event_processing.event_accumulator")
    output_dir = tmp_path / "run"
    words = [*PREVIEWS, "log_with=tensorboard", "save_every=2", "keep_checkpoints=9"]
    assert run(short_words, output_dir, *words) == 0
    assert is_output_dir(str(output_dir), list_disk)
    again = f"resume={output_dir}/checkpoints/step-00000004"
    assert run(short_words, output_dir, *words, again) == 0
    found = accumulator.EventAccumulator(
        str(output_dir / "tensorboard"), size_guidance={accumulator.AUDIO: 0, accumulator.SCALARS: 0}
    )
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows(output_dir)]
    assert {"perf/clips_per_second", "train/lr", "train/grad_norm"} <= set(found.Tags()["scalars"])
    heard = found.Audio("previews/1/audio")
    assert [event.step for event in heard] == [0, 4, STEPS]
    assert [event.step for event in found.Images("previews/1/spectrogram")] == [0, 4, STEPS]
    for event in heard:
        audio_NC, rate_hz = soundfile.read(io.BytesIO(event.encoded_audio_string), dtype="int16")
        path = output_dir / "previews" / f"step-{event.step:08d}" / "1.flac"
        expected_NC, expected_rate_hz = soundfile.read(path, dtype="int16")
        assert rate_hz == expected_rate_hz
        assert (audio_NC == expected_NC).all()


def interrupted_and_continued(words, output_dir, tracker):
    """The rows of a run that a checkpoint of step 4 was continued from, in the tracker's run of before."""
    words = [*words, *PREVIEWS, f"log_with={tracker}", "log_project=drums", "name=loops", "save_every=2"]
    words += ["keep_checkpoints=9", "number_of_steps=6"]
    assert run(words, output_dir) == 0
    assert run(words, output_dir, f"resume={output_dir}/checkpoints/step-00000004") == 0
    return rows(output_dir)


def id_of(output_dir):
    return json.loads((output_dir / "trackers.json").read_text())["id"]


def assert_losses(found, expected):
    """found: (step, loss) as a tracker has them, some of them from both starts."""
    assert dict(found) == {row["step"]: pytest.approx(row["loss"], rel=1e-6) for row in expected}


def test_trackio_has_one_run_with_curves_and_previews(short_words, tmp_path, monkeypatch):
    # Read as it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = package("trackio")
    storage = package("trackio.sqlite_storage").SQLiteStorage
    output_dir = tmp_path / "run"
    expected = interrupted_and_continued(short_words, output_dir, "trackio")
    name = f"loops-{id_of(output_dir)}"
    assert [found.name for found in trackio.Api().runs("drums")].count(name) == 1
    logs = storage.get_logs("drums", name)
    assert_losses([(row["step"], row["train/loss"]) for row in logs if "train/loss" in row], expected)
    heard = {row["step"]: row for row in logs if "previews/1/audio" in row}
    assert sorted(heard) == [0, 4, STEPS]
    assert all(row["previews/1/audio"]["_type"] == "trackio.audio" for row in heard.values())
    assert all(row["previews/1/spectrogram"]["_type"] == "trackio.image" for row in heard.values())


def test_mlflow_has_one_run_with_curves_and_previews(short_words, tmp_path, monkeypatch):
    mlflow = package("mlflow")
    package("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    output_dir = tmp_path / "run"
    expected = interrupted_and_continued(short_words, output_dir, "mlflow")
    (found,) = mlflow.search_runs(experiment_names=["drums"], output_format="list")
    assert (found.info.status, found.data.params["rank"]) == ("FINISHED", "4")
    client = mlflow.MlflowClient()
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert_losses([(metric.step, metric.value) for metric in history], expected)
    for step in (0, 4, STEPS):
        files = {file.path for file in client.list_artifacts(found.info.run_id, f"previews/step-{step:08d}")}
        assert files == {f"previews/step-{step:08d}/{i}.{kind}" for i in range(4) for kind in ("flac", "png", "json")}


def test_wandb_without_a_network_continues_a_run_by_its_id_and_has_the_previews(short_words, tmp_path, monkeypatch):
    package("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    output_dir = tmp_path / "run"
    interrupted_and_continued(short_words, output_dir, "wandb")
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime)
    assert first.name.endswith(id_of(output_dir))
    assert second.name.endswith(id_of(output_dir))
    for folder, steps in ((first, [0, 4, STEPS]), (second, [STEPS])):
        for kind in ("audio/previews/1/audio", "images/previews/1/spectrogram"):
            found = [path.name.split("_")[1] for path in folder.glob(f"files/media/{kind}_*")]
            assert sorted(found) == [str(step) for step in steps]
        # Its records, as `wandb sync` sends them.
        (records,) = folder.glob("*.wandb")
        assert b"train/loss" in records.read_bytes()
