"""The page for people and the routes it reads, without a browser: who sees what, and what hostile text comes to."""

import json
import re

import pytest
from starlette.testclient import TestClient

from sa3dist.serve.app import create_app
from sa3dist.serve.keys import Keys
from sa3dist.serve.leases import Leases
from sa3dist.serve.options import RunOptions
from sa3dist.serve.page_routes import PAGE
from sa3dist.serve.server_options import DEFAULT_APP, WebOptions

HOSTILE = "</script><img src=x onerror=alert(1)>"
HERE = RunOptions("local", (0,), work_dir="", locks="", host="h", lease_seconds=60)


@pytest.fixture
def database_url(tmp_path):
    return f"sqlite:///{tmp_path / 'jobs.db'}"


@pytest.fixture
def keys(tmp_path):
    made = Keys(tmp_path)
    users = [("anna", "submit"), ("ben", "submit"), ("boss", "admin")]
    return [{"Authorization": f"Key {made.add(name, scope)}"} for name, scope in users]


@pytest.fixture
def client(store, keys, tmp_path):
    with TestClient(create_app(WebOptions(data_dir=tmp_path, is_open=False, min_free_bytes=0), store)) as opened:
        yield opened


def submit(client, key, **more) -> str:
    request = {"audio_data_url": f"https://93.184.216.34/{HOSTILE}.zip", "number_of_steps": 100, **more}
    answer = client.post(f"/{DEFAULT_APP}", json=request, headers=key)
    assert answer.status_code == 200, answer.text
    return answer.json()["request_id"]


def see(client):
    """Let the server read what the database has by now."""
    client.portal.call(client.app.state.service.snapshot.refresh)


def run_of(job):
    run = job.attempt_folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    return run


def write_rows(job, *steps, ends="\n"):
    rows = [json.dumps({"step": step, "loss": 1 / step, "step_seconds": 2.0}) for step in steps]
    with (run_of(job) / "metrics.jsonl").open("a") as file:
        file.write("\n".join(rows) + ends)


def test_the_page_has_no_markup_of_others_and_nothing_from_elsewhere(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    asked = re.findall(r'(?:src|href)="([^"#]*)"', answer.text)
    files = [name for name in asked if name.startswith("page/")]
    assert len(files) == 4
    assert {client.get(f"/{name}").status_code for name in files} == {200}
    assert set(asked) - set(files) == {"data:,", "openapi.json"}
    assert not re.search(r"\son\w+=|\sstyle=|<script>|<style", answer.text)
    script = (PAGE / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)
    for name in PAGE.iterdir():
        assert "://" not in name.read_text(), name


def test_the_page_has_no_other_files(client):
    for name in ("page.py", "%2e%2e%2fapp.py", "index.html", "..%2fkeys.py", "%2fetc%2fpasswd"):
        assert client.get(f"/page/{name}").status_code in (404, 405), name


def test_jobs_are_listed_and_shown_to_the_key_that_made_them_and_to_admins_alone(client, keys, store):
    anna, ben, boss = keys
    first, second, other = submit(client, anna), submit(client, anna, seed=1), submit(client, ben)

    def listed(key, **query):
        return [job["id"] for job in client.get("/api/jobs", headers=key, params=query).json()["jobs"]]

    assert [listed(key) for key in keys] == [[second, first], [other], [other, second, first]]
    page = client.get("/api/jobs", headers=anna, params={"limit": 1}).json()
    assert listed(anna, limit=1, before=page["before"]) == [first]
    run_of(store.get(first)).joinpath("report.html").write_text("a run")
    for address in ("", "/progress"):
        codes = [client.get(f"/api/jobs/{first}{address}", headers=key).status_code for key in (anna, ben, boss, {})]
        assert codes == [200, 404, 200, 401]
    told = client.get(f"/api/jobs/{first}", headers=boss).json()
    assert (told["key"], told["state"], told["queue_position"]) == ("anna", "QUEUED", 0)
    assert client.get("/api/jobs").status_code == 401


def test_a_key_is_told_who_it_is_and_none_that_one_is_needed(client, keys):
    told = [client.get("/api/about", headers=key).json() for key in (*keys, {}, {"Authorization": "Key 0:0"})]
    assert [one["caller"] for one in told] == ["anna", "ben", "boss", None, None]
    assert [one["is_admin"] for one in told] == [False, False, True, False, False]
    assert all(one["needs_key"] for one in told)
    assert {"audio_data_url", "rank"} <= set(told[0]["fields"])


def test_losses_and_log_lines_come_once_and_another_attempts_from_the_first(client, keys, store):
    submit(client, keys[0])
    leases = Leases(store)
    job = leases.claim(HERE)
    leases.publish(job, stage="train", step=3)
    write_rows(job, 1, 2, 3, ends='\n{"step": 4, "lo')
    (job.folder / "logs.jsonl").write_text(json.dumps({"message": HOSTILE, "timestamp": "t"}) + "\n")
    address = f"/api/jobs/{job.id}"

    def progress(before):
        see(client)
        query = {name: before[name] for name in ("logs_at", "attempt", "rows_at")} if before else {}
        answer = client.get(f"{address}/progress", headers=keys[0], params=query)
        assert answer.headers["content-type"] == "application/json"
        return answer.json()

    first = progress(None)
    assert first["begins"]
    assert first["rows"] == [[1, 1.0, None], [2, 0.5, None], [3, 1 / 3, None]]
    assert first["logs"] == [{"message": HOSTILE, "timestamp": "t"}]
    second = progress(first)
    assert (second["begins"], second["rows"], second["logs"]) == (False, [], [])
    with (run_of(job) / "metrics.jsonl").open("a") as file:
        file.write('ss": 0.25}\n')
    third = progress(second)
    assert third["rows"] == [[4, 0.25, None]]
    assert leases.try_again(job, {"detail": "x"}, -9, counts=False)
    job = leases.claim(HERE)
    write_rows(job, 1, 2)
    assert (progress(third)["begins"], [row[0] for row in progress(third)["rows"]]) == (True, [1, 2])


def test_the_time_left_is_the_newest_pace_times_the_steps_left(client, keys, store):
    submit(client, keys[0])
    leases = Leases(store)
    job = leases.claim(HERE)
    leases.publish(job, stage="train", step=10)
    write_rows(job, *range(1, 11))
    (listed,) = client.get("/api/jobs", headers=keys[0]).json()["jobs"]
    assert (listed["step"], listed["steps"], listed["eta_seconds"]) == (10, 100, 180.0)
    leases.publish(job, stage="export")
    assert client.get("/api/jobs", headers=keys[0]).json()["jobs"][0]["eta_seconds"] is None


def test_a_report_opens_at_its_signed_address_alone_apart_from_the_page_and_without_paths(client, keys, store):
    first, second = submit(client, keys[0]), submit(client, keys[0], seed=1)
    for job_id in (first, second):
        run = run_of(store.get(job_id))
        (run / "report.html").write_text(f"made in {run}")
        preview = run / "previews/step-00000020"
        preview.mkdir(parents=True)
        (preview / "0.flac").write_bytes(b"sound")
        (run / "secret").write_text("secret")
    address = client.get(f"/api/jobs/{first}", headers=keys[0]).json()["report_url"]
    answer = client.get(address)
    assert answer.text == "made in job/attempt-0/run"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox ")
    assert "allow-same-origin" not in policy
    assert client.get(address.replace("report.html", "previews/step-00000020/0.flac")).content == b"sound"
    assert client.get(address.replace(first, second)).status_code == 404
    assert client.get(re.sub(r"/report/\d", "/report/9", address)).status_code == 404
    for path in ("secret", "../secret", "previews/step-20/%2e%2e%2f%2e%2e%2fsecret.png", "previews/step-20/0.json"):
        assert client.get(address.replace("report.html", path)).status_code in (404, 405, 422), path
    store.cancel(first)
    assert client.delete(f"/{DEFAULT_APP}/requests/{first}", headers=keys[0]).status_code == 200
    assert client.get(address).status_code == 404


def test_the_routes_of_the_page_are_documented(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/api/about", "/api/jobs", "/api/jobs/{job_id}", "/api/jobs/{job_id}/progress"} <= set(paths)
