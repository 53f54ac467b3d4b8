"""A new attempt continues what an older one has saved; what a run says becomes what clients are told."""

import dataclasses
import json
import os

import pytest

from sa3dist.serve import attempts
from sa3dist.serve.job_store import JobStore
from sa3dist.serve.logs import LONGEST_LINE, Logs, public


@pytest.fixture
def job(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    request = {"audio_data_url": "https://example.org/a.zip", "rank": 300, "lora_checkpoint_url": "https://x/y"}
    made = store.submit(request, app="a", key="k")
    store.close()
    return made


def saved(job, number: int, *steps: int) -> None:
    run = job.folder / f"attempt-{number}" / "run"
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(str(step))
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    (run / "run.lock").write_text("{}")
    (run / "result.json").write_text("{}")


def prepared(job, fence: int):
    folder = dataclasses.replace(job, fence=fence).attempt_folder
    attempts.prepare(job, {"rank": 3}, folder)
    return folder


def test_an_attempt_continues_the_one_that_got_furthest_with_its_rows_and_without_its_end(job):
    saved(job, 1, 1, 2)
    saved(job, 2, 4, 5)
    saved(job, 3)
    folder = prepared(job, 4)
    run = folder / "run"
    assert sorted(os.listdir(run)) == ["checkpoints", "metrics.jsonl"]
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000004", "step-00000005"]
    assert (run / "checkpoints/step-00000005/state.json").read_text() == "5"
    assert json.loads((folder / "request.json").read_text()) == {"rank": 3, "output_dir": str(run)}


def test_what_a_dying_attempt_still_writes_or_removes_does_not_reach_the_one_after_it(job):
    saved(job, 1, 1, 2)
    run = prepared(job, 2) / "run"
    before = job.folder / "attempt-1/run"
    with (before / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 3}\n')
    (before / "checkpoints/step-00000002/state.json").unlink()
    assert attempts.progress(run)["step"] == 2
    assert (run / "checkpoints/step-00000002/state.json").read_text() == "2"


def test_an_attempt_killed_while_it_took_over_is_passed_over(job):
    saved(job, 1, 1)
    half = job.folder / "attempt-2/.run/checkpoints/step-00000009"
    half.mkdir(parents=True)
    assert os.listdir(prepared(job, 3) / "run/checkpoints") == ["step-00000001"]


def test_an_attempt_without_a_predecessor_begins_with_an_empty_run(job):
    assert os.listdir(prepared(job, 1) / "run") == []


def test_progress_is_the_last_whole_row_or_the_heartbeat_whichever_is_later(tmp_path):
    assert attempts.progress(tmp_path) == {"step": 0}
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"st')
    (tmp_path / "heartbeat.json").write_text('{"step": 15, "stage": "train"}')
    assert attempts.progress(tmp_path) == {"stage": "train", "step": 20}
    (tmp_path / "heartbeat.json").write_text('{"step": 26, "stage": "train"}')
    assert attempts.progress(tmp_path)["step"] == 25


def test_each_refused_field_is_an_entry_of_its_own_with_what_was_sent(job):
    text = (
        "rank: 300 is not valid, expected a whole number, 1..256\n"
        "https://example.org/a.zip, kick: no caption\nlora_checkpoint: damaged"
    )
    found = attempts.failure(job, 2, text)["detail"]
    assert found == [
        {
            "loc": ["body", "rank"],
            "msg": "300 is not valid, expected a whole number, 1..256",
            "type": "value_error",
            "input": 300,
        },
        {
            "loc": ["body", "audio_data_url"],
            "msg": "https://example.org/a.zip, kick: no caption",
            "type": "value_error",
            "input": "https://example.org/a.zip",
        },
        {
            "loc": ["body", "lora_checkpoint_url"],
            "msg": "lora_checkpoint: damaged",
            "type": "value_error",
            "input": "https://x/y",
        },
    ]


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("rank is 300, but model.layers.3 (64 x 64) allows at most 64; lower it or exclude it", "rank"),
        ("include ['x'] and exclude ['y'] leave none of the 20 layers", "include"),
        ("adapter_type: lora is not what it was", "adapter_type"),
        ("https://example.org/a.zip: not found; check the address", "audio_data_url"),
        ("https://example.org/a.zip, clip rank: caption is empty; describe the clip in it", "audio_data_url"),
        ("work_dir/shards/0123/shard-00000.tar, clip a: is silent", "audio_data_url"),
        ("https://x/y: rank is 8 in the file, 16 in the attached adapter", "lora_checkpoint_url"),
        ("merge with lora_checkpoint of another base", "lora_checkpoint_url"),
        ("medium-base: the tensors do not fit model_config.json beside it", "model"),
        ("mixed_precision: no loses gradients over a float16 base; use bf16, or base_precision fp32", "base_precision"),
        ("validation: nothing would be left to train on; hold out less", None),
        ("log_with: wandb is not installed; pip install wandb", None),
    ],
)
def test_a_refusal_is_placed_where_its_line_points_and_nowhere_else(job, line, place):
    (entry,) = attempts.failure(job, 2, line)["detail"]
    assert entry["loc"] == ["body", *([place] if place else [])]
    assert entry["msg"] in (line, line.partition(": ")[2])


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (1, "runner_server_error"),
        (70, "runner_server_error"),
        (-9, "runner_disconnected"),
        (137, "runner_disconnected"),
    ],
)
def test_what_is_not_the_clients_mistake_is_one_text_and_a_word(job, code, word):
    assert attempts.failure(job, code, "why") == {"detail": "why", "error_type": word}


def test_the_reason_is_the_status_or_else_the_last_line(tmp_path):
    log = tmp_path / "log.txt"
    assert attempts.message(tmp_path, log) == "The trainer ended without a word"
    log.write_text("first\nCUDA error: no device\n\n")
    assert attempts.message(tmp_path, log) == "CUDA error: no device"
    (tmp_path / "status.json").write_text('{"message": "disk full"}')
    assert attempts.message(tmp_path, log) == "disk full"


def test_logs_are_whole_lines_without_this_machines_paths_and_bounded(job):
    job.folder.mkdir()
    log = job.folder / "log.txt"
    logs = Logs(log, job.folder, {str(job.folder): "job", "/data/uploads/x": "https://example.org/a.zip"})
    assert not logs.move()
    log.write_bytes(b"in " + str(job.folder).encode() + b"/run\nstep 1\rstep 2\n\nha")
    assert logs.move()
    with log.open("ab") as more:
        more.write(b'lf\n{"lora_file": {"url": "file:///data"}}\n' + b"x" * 5000 + b"\nread /data/uploads/x\n")
    while logs.move():
        pass
    rows = [json.loads(line) for line in (job.folder / "logs.jsonl").read_text().splitlines()]
    texts = ["in job/run", "step 2", "half", "x" * LONGEST_LINE, "read https://example.org/a.zip"]
    assert [row["message"] for row in rows] == texts
    assert {row["source"] for row in rows} == {"USER"}


def test_the_longest_path_is_replaced_first():
    assert public("/data/jobs/1/run and /data", {"/data": "D", "/data/jobs/1": "job"}) == "job/run and D"
