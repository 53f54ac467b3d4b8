"""The page of a run: it holds every point and clip, keeps its size, survives torn files, and runs nobody's script."""

import dataclasses
import json
import statistics

import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3dist import cli
from sa3dist.formats import dataset_digest
from sa3dist.report import facts
from sa3dist.report.charts import running_median, trend_width
from sa3dist.report.page import render_runs
from sa3dist.report.run_folder import read_run, without_keys
from tests.helpers.pages import Elements
from tests.helpers.run_folders import decoded, make_run, write_lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, make_run(folder)


def rendered(*folders, **options):
    page = render_runs([read_run(folder) for folder in folders], folders[0] / "report.html", **options)
    return Elements(page), page


def points(series):
    return list(zip(series["x"], series["y"], strict=True))


def test_charts_hold_the_points_of_the_metrics(run):
    folder, rows = run
    charts = rendered(folder)[0].charts()
    for name, key in (("loss", "loss"), ("grad_norm", "grad_norm"), ("lr", "lr"), ("validation", "val/loss")):
        assert points(charts[name]["series"][0]) == [(row["step"], row[key]) for row in rows if key in row]
    last = charts["loss_by_timestep"]["series"][-1]
    column = [row["loss_by_timestep"][-1] for row in rows[1:]]
    assert last["y"] == running_median(column)
    # A level that no clip of a row fell on has no points, rather than zeros.
    assert len(charts["loss_by_timestep"]["series"]) == 4
    assert charts["validation"]["series"][1]["y"] == [1.5, 1.5]
    assert points(charts["validation"]["series"][2]) == [(20, 1.48)]
    assert charts["clips"]["series"][0]["y"] == [8.0] * 40


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "step 30 of 40, running when this page was written"),
        ("done", "step 30 of 40, ended early: early_stop: 3 evaluations"),
        ("interrupted", "step 30 of 40, interrupted, can be continued: stopped after step 30 (SIGTERM)"),
    ],
)
def test_a_run_that_ends_before_its_last_step_says_so_and_why(run, state, said):
    read = read_run(run[0])
    rows = [row for row in read.rows if row["step"] <= 30]
    message = "done" if state == "done" else "stopped after step 30 (SIGTERM)"
    status = {"state": state, "message": message} if state else {}
    # That of an end before, where a run that goes on has not come to its own yet.
    result = {"ended_early": "early_stop: 3 evaluations"}
    assert facts.state(dataclasses.replace(read, rows=rows, status=status, result=result)) == said


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_a_trend_is_the_median_of_a_rows_neighbours(values):
    half = trend_width(len(values)) // 2
    trend = running_median(values)
    assert len(trend) == len(values)
    middle = len(values) // 2
    assert trend[middle] == statistics.median(values[max(0, middle - half) : middle + half + 1])


def test_one_outlier_does_not_move_the_trend():
    values = [1.0] * 50
    values[20] = 1e9
    assert running_median(values) == [1.0] * 50


def test_previews_stand_inside_with_the_nearest_training_clip_and_sound_as_their_files(run):
    folder, _ = run
    elements, page = rendered(folder)
    clips = [attributes["src"] for attributes in elements.of("audio")]
    # 3 steps of 2 prompts, and the nearest training clip of one preview.
    assert len(clips) == 7
    assert all(len(decoded(clip)) for clip in clips)
    original, _ = soundfile.read(folder / "previews/step-00000000/0.flac", always_2d=True)
    error = decoded(clips[0]) - original
    assert (error**2).mean() < 0.05 * (original**2).mean()
    assert "healthy" in page
    assert "2 times" in page


def test_clips_trained_on_are_found_in_shards_that_hold_those_held_out_too(tmp_path):
    folder = tmp_path / "run"
    make_run(folder, steps=3, preview_steps=(0,))
    clips = read_run(folder).index.clips
    about = {"dataset_sha256": dataset_digest(clips[:-1]), "held_out_clips": [clips[-1].key]}
    (folder / "config.json").write_text(json.dumps(about))
    assert read_run(folder).index.clips == clips[:-1]
    elements, page = rendered(folder)
    assert sum(elements.charts()["lengths"]["series"][0]["y"]) == 3
    assert f"1: {clips[-1].key}" in elements.words
    # Held out are the clips of another data set, one of which has the name of one that is trained on.
    about["dataset_sha256"] = dataset_digest(clips)
    (folder / "config.json").write_text(json.dumps(about))
    assert read_run(folder).index.clips == clips


def test_a_page_that_is_full_leaves_older_clips_beside_it(run):
    folder, _ = run
    whole = len(rendered(folder)[1].encode()) / 1e6
    elements, page = rendered(folder, megabytes=0.75 * whole)
    assert len(page.encode()) / 1e6 <= 0.75 * whole
    clips = [attributes["src"] for attributes in elements.of("audio")]
    beside = [clip for clip in clips if not clip.startswith("data:")]
    assert beside
    assert all((folder / clip).exists() for clip in beside)
    # The newest stays inside.
    assert not any("step-00000040" in clip for clip in beside)
    elements, _ = rendered(folder, inside=False)
    previews = [one["src"] for one in elements.of("audio") if not one["src"].startswith("data:")]
    assert len(previews) == 6


# What HTML, scripts, JSON and addresses could take for their own.
HOSTILE = st.one_of(
    st.sampled_from(
        ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\" onload='x'", "<!--", "&lt;"]
    ),
    st.text(max_size=40),
).filter(lambda text: text.isprintable() and text.strip())


@settings(max_examples=10)
@given(HOSTILE)
def test_what_users_wrote_is_shown_as_text_whatever_it_is(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("hostile") / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text(json.dumps({"name": text, "preview_prompts": [text]}))
    write_lines(folder / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    write_lines(folder / "warnings.jsonl", [{"level": "warning", "message": text}])
    write_lines(
        folder / "health.jsonl", [{"step": 1, "verdict": text, "layers": [{"name": text, "update_ratio": 1.0}]}]
    )
    (folder / "previews/step-00000001").mkdir(parents=True)
    (folder / "previews/step-00000001/0.flac").write_bytes(b"torn")
    (folder / "previews/step-00000001/0.json").write_text(json.dumps({"prompt": text}))
    other = folder.parent / "other"
    other.mkdir()
    (other / "run.yaml").write_text(json.dumps({"name": f"{text} 2"}))
    elements, page = rendered(folder, other)
    # The data, uPlot and ours: nothing else runs, no attribute is a handler.
    assert len(elements.scripts) == 3
    assert not [name for _, found in elements.tags for name in found if name.startswith("on")]
    # The one link that is loaded is the empty icon.
    assert [found["href"] for found in elements.of("link")] == ["data:,"]
    assert without_keys(text) in elements.words
    assert elements.charts()["loss"]["series"][0]["label"] == without_keys(text)


def test_keys_in_addresses_are_not_shown(tmp_path):
    make_run(tmp_path / "run", audio_data_url="https://me:secret@host/clips.zip?token=secret", preview_steps=(0,))
    write_lines(
        tmp_path / "run/warnings.jsonl",
        [{"level": "warning", "message": "s3://bucket/x?key=secret is slow"}],
    )
    page = rendered(tmp_path / "run")[1]
    assert "https://host/clips.zip" in page
    assert "secret" not in page


def test_torn_files_and_parts_that_are_not_there_leave_a_page(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n[1]\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    (folder / "health.jsonl").write_text('{"step": 1}\n{"step"')
    (folder / "copies.jsonl").write_text('{"step": 1, "judged": false, "reason": "3 files are held out"}\n')
    (folder / "status.json").write_text("{")
    elements, page = rendered(folder)
    assert points(elements.charts()["loss"]["series"][0]) == [(1, 1.5)]
    assert "running when this page was written" in page


def test_runs_are_compared_on_one_page_with_what_differs_first(run, tmp_path):
    other = tmp_path / "other"
    make_run(other, name="another", rank=7)
    elements, page = rendered(run[0], other)
    assert [line["label"] for line in elements.charts()["loss"]["series"]] == ["a run", "another"]
    assert page.index(">rank<") < page.index(">number_of_steps<")
    # The name, both folders and the rank.
    assert page.count('class="differs"') == 4


def test_compared_runs_of_one_name_are_called_by_their_folders(tmp_path):
    first, second, third = tmp_path / "drums", tmp_path / "drums-rank32", tmp_path / "more" / "drums"
    for folder in (first, second, third):
        make_run(folder, name="sa3dist-lora")
    for folders, expected in (
        ([first, second], ["drums", "drums-rank32"]),
        ([first, second, third], [str(first), "drums-rank32", str(third)]),
    ):
        elements, _ = rendered(*folders)
        assert [line["label"] for line in elements.charts()["loss"]["series"]] == expected


def test_the_command_writes_the_page_and_refuses_what_is_no_run(run, tmp_path, capsys):
    folder, _ = run
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no run's folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    for megabytes in ("0", "-1", "nan", "inf", "1e300"):
        assert cli.main(["report", str(folder), f"--megabytes={megabytes}"]) == 2
