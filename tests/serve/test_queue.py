"""Jobs run by schedulers, runners and trainers as they are: done, refused, failed, cancelled, interrupted."""

import json
import signal
import time
from pathlib import Path

import pytest

from sa3dist.serve.job_store import JobStore
from sa3dist.serve.webhooks import Outbox
from tests.helpers import serve
from tests.helpers.clips import captioned, write_zip

pytestmark = pytest.mark.slow
HOOK = "https://example.org/hook"


@pytest.fixture(scope="module")
def ended(tmp_path_factory, demo_base):
    """Four jobs, by what became of them, run two at a time."""
    data = tmp_path_factory.mktemp("serve")
    clips = write_zip(data / "clips.zip", captioned(8, seconds=0.5))
    store = JobStore(f"sqlite:///{data / 'jobs.db'}")
    host = serve.Host("here", store, data, demo_base, devices=[0, 1], stop_seconds=20)

    def submit(steps=6, retries=10, settings=None, **more):
        words = {"app": serve.APP, "key": "k", "webhook": HOOK, "retries": retries}
        wire = serve.request(clips, steps, **more)
        return store.submit(wire, **words, settings=serve.SETTINGS | (settings or {})).id

    jobs = {
        "interrupted": submit(steps=20),
        "cancelled": submit(steps=5000),
        "refused": submit(rank=300, seed=-1),
        "not finite": submit(retries=0, settings={"learning_rate": 1e30}),
    }
    host.start()
    try:
        wait(lambda: store.get(jobs["interrupted"]).step > 3)
        (runner,) = [p for p in host.processes("runner") if marked_as(p, jobs["interrupted"])]
        serve.send(runner, signal.SIGTERM)
        wait(lambda: store.get(jobs["cancelled"]).step > 2)
        store.cancel(jobs["cancelled"])
        wait(lambda: all(store.get(job_id).is_finished for job_id in jobs.values()))
        host.stop()
        wait(lambda: not host.processes("runner"))
        yield {name: store.get(job_id) for name, job_id in jobs.items()}, host, store
    finally:
        host.end_all()
        store.close()


def marked_as(process, job_id: str) -> bool:
    return any(found.pid == process.pid and mark.job == job_id for found, mark in serve.marks())


def wait(until) -> None:
    deadline = time.monotonic() + 240
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_that_is_done_has_its_files(ended):
    job = ended[0]["interrupted"]
    assert (job.state, job.step, job.exit_code) == ("SUCCEEDED", 20, 0)
    file = job.result["lora_file"]
    assert (job.folder / file["path"]).stat().st_size == file["file_size"]
    assert file["url"] == (job.folder / file["path"]).resolve().as_uri()
    said = [json.loads(line)["message"] for line in (job.folder / "logs.jsonl").read_text().splitlines()]
    assert any(line.startswith("train 20/20") for line in said)
    assert not any(str(job.folder) in line for line in said)
    assert not list(Path(ended[1].locks).glob(f"job-{job.id}"))


def test_a_refused_job_names_every_field_and_is_not_tried_again(ended):
    job = ended[0]["refused"]
    assert (job.state, job.exit_code, job.attempts) == ("FAILED", 2, 1)
    assert [(entry["loc"], entry["input"]) for entry in job.error["detail"]] == [
        (["body", "rank"], 300),
        (["body", "seed"], -1),
    ]


def test_a_job_that_fails_for_good_says_why(ended):
    job = ended[0]["not finite"]
    assert (job.state, job.exit_code, job.error["error_type"]) == ("FAILED", 70, "runner_server_error")
    assert "not finite" in job.error["detail"]


def test_a_cancelled_job_has_saved_and_is_gone(ended):
    job = ended[0]["cancelled"]
    assert (job.state, job.exit_code, job.error["error_type"]) == ("CANCELLED", 75, "client_cancelled")
    assert ended[1].processes("trainer") == []


def test_an_interrupted_job_goes_on_from_its_checkpoint_and_uses_up_no_retry(ended):
    job = ended[0]["interrupted"]
    assert (job.state, job.attempts, job.failures) == ("SUCCEEDED", 2, 0)
    rows = (job.attempt_folder / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 21))
    (resumed,) = [json.loads(row)["resumed_from"] for row in rows if "resumed_from" in row]
    assert resumed > 3
    # The last attempt holds all.
    assert [path.name for path in job.folder.glob("attempt-*")] == ["attempt-2"]


def test_every_end_has_one_webhook(ended):
    jobs, _, store = ended
    due = Outbox(store.database).due(30)
    assert sorted(delivery.job_id for delivery in due) == sorted(job.id for job in jobs.values())
