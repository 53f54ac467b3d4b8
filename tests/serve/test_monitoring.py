"""What an operator sees of a server: health, counts, log lines; and what SIGTERM does."""

import json
import logging
import socket
import threading
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from sa3dist.commands import serve as command
from sa3dist.errors import ConfigError
from sa3dist.runtime.exit_status import command as run_program_with
from sa3dist.serve import monitoring
from sa3dist.serve.app import create_app
from sa3dist.serve.leases import Leases
from sa3dist.serve.options import RunOptions
from sa3dist.serve.scheduler import Scheduler
from sa3dist.serve.server_options import DEFAULT_APP, WebOptions
from sa3dist.serve.tables import QUEUED
from tests.helpers import serve

REQUEST = {"audio_data_url": "data:application/zip;base64,UEsFBgAAAAAAAAAAAAAAAAAAAAAAAA=="}


@pytest.fixture
def database_url(tmp_path):
    return f"sqlite:///{tmp_path / 'jobs.db'}"


@pytest.fixture
def client(tmp_path, store):
    with TestClient(create_app(WebOptions(data_dir=tmp_path, min_free_bytes=0), store)) as opened:
        yield opened


def metrics(client) -> dict[tuple, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_health_is_the_age_of_what_the_database_last_said(client, monkeypatch):
    assert client.get("/healthz").status_code == 200
    monkeypatch.setattr(monitoring, "STALE_SECONDS", -1.0)
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()["ok"]) == (503, False)


def test_health_does_not_depend_on_the_time_of_day(client, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert client.get("/healthz").status_code == 200


def test_prometheus_reads_jobs_by_state_and_answers_by_status(client):
    before = metrics(client)
    for seed in range(3):
        client.post(f"/{DEFAULT_APP}", json={**REQUEST, "seed": seed})
    client.get("/nothing/here/requests/x/status")
    after = metrics(client)
    assert (after["sa3dist_jobs", "QUEUED"], after["sa3dist_jobs", "RUNNING"]) == (3, 0)

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("sa3dist_requests_total", "200", "POST") == 3
    assert grown("sa3dist_requests_total", "404", "GET") == 1
    assert after["process_resident_memory_bytes",] > 0


@pytest.fixture
def lines():
    """What the server's log has had, as read back from its lines."""
    said: list[dict] = []

    class Reader(logging.Handler):
        def emit(self, record):
            said.append(json.loads(monitoring.JsonLines().format(record)))

    reader, ours = Reader(), logging.getLogger("sa3dist")
    level = ours.level
    ours.addHandler(reader)
    ours.setLevel(logging.INFO)
    yield said
    ours.removeHandler(reader)
    ours.setLevel(level)


def test_a_log_line_has_the_id_that_its_answer_has(client, lines):
    answers = [client.post(f"/{DEFAULT_APP}", json=REQUEST), client.post(f"/{DEFAULT_APP}", content=b"{")]
    client.get("/healthz")
    found = [(line["request_id"], line["status"], line["level"]) for line in lines]
    assert found == [(answer.headers["x-request-id"], answer.status_code, "INFO") for answer in answers]
    assert lines[0]["path"] == f"/{DEFAULT_APP}"


def test_an_error_that_nobody_foresaw_is_logged_under_its_id_and_answered_in_the_endpoints_shape(
    client, lines, monkeypatch
):
    def fail(*words):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(client.app.state.service.snapshot, "position", fail)
    answer = client.post(f"/{DEFAULT_APP}", json=REQUEST)
    assert (answer.status_code, answer.json()["error_type"]) == (500, "internal_error")
    assert "unforeseen" not in answer.text
    first, last = lines
    assert first["request_id"] == last["request_id"] == answer.headers["x-request-id"]
    assert (first["level"], last["status"]) == ("ERROR", 500)
    assert "RuntimeError: unforeseen" in first["trace"]


def test_a_ready_answer_is_that_of_the_route_and_goes_to_nobody_else(tmp_path, store):
    from sa3dist.serve.keys import Keys

    one, two = ({"Authorization": f"Key {Keys(tmp_path).add(name, 'submit')}"} for name in ("one", "two"))
    with TestClient(create_app(WebOptions(data_dir=tmp_path, is_open=False, min_free_bytes=0), store)) as client:
        first = client.post(f"/{DEFAULT_APP}", json=REQUEST, headers=one).json()
        address = first["status_url"]
        # Made by the route, and ahead of it.
        made, ready = (client.get(address + query, headers=one) for query in ("?logs=no", ""))
        assert (made.status_code, made.content) == (ready.status_code, ready.content)
        assert ready.headers["x-fal-request-id"] == first["request_id"]
        assert [client.get(address, headers=who).status_code for who in (two, {})] == [404, 401]
        # Another address of the server has other addresses in its answer.
        elsewhere = client.get(address, headers=one | {"Host": "sound.example.org"}).json()
        assert elsewhere["cancel_url"].startswith("http://sound.example.org/")
        # And nothing stale: the first of two leaves the queue.
        second = client.post(f"/{DEFAULT_APP}", json={**REQUEST, "seed": 1}, headers=one).json()
        assert client.get(second["status_url"], headers=one).json()["queue_position"] == 1
        client.put(first["cancel_url"], headers=one)
        assert client.get(second["status_url"], headers=one).json()["queue_position"] == 0
        assert client.get(address, headers=one).json()["status"] == "COMPLETED"
        client.delete(first["response_url"], headers=one)
        assert client.get(address, headers=one).status_code == 404


def test_files_of_a_result_are_sent_as_what_the_result_says_they_are(client, store):
    made = client.post(f"/{DEFAULT_APP}", json=REQUEST).json()
    leases = Leases(store)
    job = leases.claim(RunOptions("local", (0,), work_dir="", locks="", host="here"))
    kinds = {
        "lora_file": ("lora.safetensors", "application/octet-stream"),
        "config_file": ("config.json", "application/json"),
    }
    for name, _ in kinds.values():
        (job.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (job.folder / name).write_text("{}")
    result = {key: {"path": name, "content_type": kind} for key, (name, kind) in kinds.items()}
    assert leases.succeed(job, result)
    client.app.state.service.snapshot.put(store.get(job.id))
    for file in client.get(made["response_url"]).json().values():
        assert client.get(file["url"]).headers["content-type"] == file["content_type"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 is not loopback, a key is needed; sa3dist serve keys add NAME"),
        # A proxy on this machine would let everybody in.
        (
            ["--public-url", "https://sound.example.org"],
            "public_url: sound.example.org is not loopback",
        ),
        (["--model", "medium-base=/no/such"], "model: medium-base: /no/such has no model_config.json"),
        (["--nodes", "2"], "nodes: 2 need --executor slurm or kubernetes"),
        (["--gpus", "99"], "gpus: 99 for each job, this host has "),
        (["--device", "cpu", "--executor", "kubernetes"], "device: cpu needs --executor local or slurm"),
        (["--set", "rnk=3"], "rnk: unknown key, did you mean rank?"),
        (["--port", "99999"], "argument --port: '99999' is not a number from 1 to 65535"),
        # Nobody would be told which one it is.
        (["--port", "0"], "argument --port: '0' is not a number from 1 to 65535"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line_and_leaves_nothing(words, said, tmp_path, capsys):
    assert command.main(["--data-dir", str(tmp_path / "data"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


def parsed(*words):
    found = []
    assert run_program_with("sa3dist serve", command.ARGUMENTS, found.append)(words) == 0
    return found[0]


def test_models_are_named_one_after_another_or_each_by_its_own_word_and_the_folder_is_called_state_too(tmp_path):
    words = ["--model", "medium-base=/a", "mine=/b=c", "--state", str(tmp_path), "--model", "small-sfx-base=/d"]
    options = parsed(*words)
    assert dict(options.model) == {"medium-base": "/a", "mine": "/b=c", "small-sfx-base": "/d"}
    assert options.data_dir == tmp_path
    assert parsed().data_dir == Path("sa3dist-serve")


@pytest.mark.parametrize(
    ("device", "here", "devices", "uses_gpus"),
    [
        ([], (4, 5), (4, 5), True),
        (["--device", "cuda"], (4, 5), (4, 5), True),
        (["--device", "cpu"], (4, 5), (0,), False),
        (["--device", "cpu", "--slots", "2"], (), (0, 1), False),
        (["--device", "cpu", "--executor", "slurm"], (4, 5), tuple(range(8)), False),
    ],
)
def test_jobs_train_on_the_device_that_the_server_is_told(device, here, devices, uses_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "gpus_here", lambda: here)
    options = command.run_options(parsed(*device), tmp_path)
    assert (options.devices, options.gpus) == (devices, uses_gpus)
    assert options.options == (("--gpus-per-node=0",) if "slurm" in device else ())


def test_gpus_that_are_asked_for_have_to_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "gpus_here", lambda: ())
    with pytest.raises(ConfigError, match="device: cuda, but this host has no GPU"):
        command.run_options(parsed("--device", "cuda"), tmp_path)


def test_a_port_that_is_taken_is_refused_ahead_of_the_first_word(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["--data-dir", str(tmp_path / "data"), "--port", str(taken.getsockname()[1])]
        assert command.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "choose another --port" in said.err
    assert "Address already in use" in said.err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--keep-days", value) for value in ("-1", "0", "nan", "inf", "1e300")),
        *((option, value) for option in ("--slots", "--min-free", "--max-queue") for value in ("-1", "9" * 12, "1.5")),
        *((option, value) for option in ("--nodes", "--gpus") for value in ("0", "9" * 12)),
    ],
)
def test_numbers_that_would_delete_or_stop_every_job_are_refused(option, value, tmp_path, capsys):
    assert command.main(["--data-dir", str(tmp_path / "data"), f"{option}={value}"]) == 2
    assert f"argument {option}: '{value}' is not a number from" in capsys.readouterr().err


def test_a_scheduler_that_cannot_start_a_job_tries_again_and_uses_up_no_retry(tmp_path, store, caplog):
    def wait(until):
        deadline = time.monotonic() + 60
        while not until():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    job = store.submit({"audio_data_url": "nowhere"}, app=DEFAULT_APP, key="k")
    words = {"work_dir": str(tmp_path / "work"), "locks": str(tmp_path / "locks"), "host": "here"}
    scheduler, stop = Scheduler(store, RunOptions("local", (0,), poll_seconds=0.01, **words)), threading.Event()
    # Stands for a disk without space: no folder can be made here.
    store.folder.rmdir()
    store.folder.touch()
    thread = threading.Thread(target=scheduler.run, args=[stop])
    thread.start()
    try:
        wait(lambda: store.get(job.id).attempts > 2)
        store.folder.unlink()
        wait((job.folder / "runner.log").exists)
    finally:
        stop.set()
        thread.join()
        scheduler.stop_jobs()
    assert store.get(job.id).failures == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "Not a directory" in warning


@pytest.mark.slow
def test_stopped_jobs_are_queued_again_at_once_and_use_up_no_retry(tmp_path, store, demo_base, demo_clips):
    settings = serve.SETTINGS | {"audio_data_url": str(demo_clips), "model": str(demo_base)}
    job = store.submit(serve.request(demo_clips, 5000), app=DEFAULT_APP, key="k", settings=settings)
    words = {"work_dir": str(tmp_path / "work"), "locks": str(tmp_path / "locks"), "host": "here"}
    scheduler = Scheduler(store, RunOptions("local", (0,), **words))
    scheduler.run_once()
    log, waited = job.folder / "attempt-1" / "log.txt", threading.Event()
    for _ in range(1200):
        if log.exists():
            break
        waited.wait(0.05)
    scheduler.stop_jobs()
    ended = store.get(job.id)
    assert (ended.state, ended.attempts, ended.failures) == (QUEUED, 1, 0)
    assert [mark for _, mark in serve.marks() if mark.job == job.id] == []
