"""The endpoint's wire over a job store, without a training: what its clients are answered, and what is refused."""

import base64
import dataclasses
import errno
import hashlib
import json
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select
from starlette.testclient import TestClient

from sa3dist.data.remote.fetch import fetch
from sa3dist.data.remote.public_addresses import PUBLIC_ONLY_VARIABLE
from sa3dist.errors import DataError
from sa3dist.serve import webhooks, wire
from sa3dist.serve.app import create_app
from sa3dist.serve.keys import Keys
from sa3dist.serve.server_options import DEFAULT_APP, WebOptions
from sa3dist.serve.tables import jobs
from tests.helpers.servers import hostile_http

REQUEST = {"audio_data_url": "data:application/zip;base64,UEsFBgAAAAAAAAAAAAAAAAAAAAAAAA==", "number_of_steps": 7}


@pytest.fixture
def options(tmp_path):
    return WebOptions(data_dir=tmp_path, models={"tiny": "/models/tiny"}, min_free_bytes=0, max_body_bytes=1 << 20)


@pytest.fixture
def database_url(tmp_path):
    return f"sqlite:///{tmp_path / 'jobs.db'}"


@pytest.fixture
def client(options, store):
    with TestClient(create_app(options, store)) as opened:
        yield opened


@pytest.fixture
def keyed(options, store, tmp_path):
    """A client of a server that needs keys, and the headers of two of them and of an admin's."""
    keys = Keys(tmp_path)
    made = [{"Authorization": f"Key {keys.add(name, scope)}"} for name, scope in USERS]
    with TestClient(create_app(dataclasses.replace(options, is_open=False), store)) as opened:
        yield opened, *made


USERS = [("one", "submit"), ("two", "submit"), ("boss", "admin")]


def submit(client, request=REQUEST, **words):
    return client.post(f"/{DEFAULT_APP}", json=request, **words)


def refused(client, **fields):
    answer = submit(client, {**REQUEST, **fields})
    assert answer.status_code == 422, answer.text
    assert isinstance(answer.json()["message"], str)
    return {tuple(item["loc"]): item["msg"] for item in answer.json()["detail"]}


def test_a_submit_tells_where_to_go_on_and_its_place_in_the_queue(client):
    first, second = submit(client).json(), submit(client, {**REQUEST, "seed": 1}).json()
    assert first["status"] == "IN_QUEUE"
    assert (first["queue_position"], second["queue_position"]) == (0, 1)
    status = client.get(first["status_url"])
    assert (status.status_code, status.json()["status"]) == (202, "IN_QUEUE")
    assert client.get(first["response_url"]).status_code == 400
    assert client.get(first["response_url"]).headers["x-fal-request-id"] == first["request_id"]


def test_equal_requests_are_one_job_and_low_priority_goes_last(client):
    low = submit(client, {**REQUEST, "seed": 2}, headers={"X-Fal-Queue-Priority": "low"}).json()
    first, again = submit(client).json(), submit(client).json()
    assert first["request_id"] == again["request_id"]
    assert client.get(low["status_url"]).json()["queue_position"] == 1


def test_a_client_says_how_long_its_job_is_kept_behind_its_end(client):
    day = {"X-Fal-Object-Lifecycle-Preference": '{"expiration_duration_seconds": 86400}'}
    wishes = {None: {}, 86400.0: day, 3600.0: {"X-Fal-Store-IO": "0", **day}}
    for number, (kept, headers) in enumerate(wishes.items()):
        made = submit(client, {**REQUEST, "seed": number}, headers=headers).json()
        store = client.app.state.service.store
        with store.database.reading() as connection:
            asked = select(jobs.c.keep_seconds).where(jobs.c.id == made["request_id"])
            assert connection.execute(asked).scalar_one() == kept


def test_a_cancelled_request_is_completed_with_an_error_and_answers_499(client):
    made = submit(client).json()
    assert client.put(made["cancel_url"]).status_code == 202
    status = client.get(made["status_url"]).json()
    assert (status["status"], status["error_type"]) == ("COMPLETED", "client_cancelled")
    assert client.get(made["response_url"]).status_code == 499
    assert client.put(made["cancel_url"]).json() == {"status": "ALREADY_COMPLETED"}
    unknown = {"status": "NOT_FOUND", "detail": "Request not found", "message": "Request not found"}
    address = made["response_url"].replace(made["request_id"], "0" * 32)
    for answer in (client.get(f"{address}/status"), client.put(f"{address}/cancel"), client.get(address)):
        assert (answer.status_code, answer.json()) == (404, unknown)


def test_each_refused_field_is_named_with_the_trainers_words(client):
    found = refused(client, rank=500, number_of_steps=True, model="/etc", work_dir="/x", ranc=1)
    assert found[("body", "rank")] == "500 is not valid, expected a whole number, 1..256"
    assert "True is not a number" in found[("body", "number_of_steps")]
    assert "small-sfx-base" in found[("body", "model")]
    assert "did you mean rank?" in found[("body", "ranc")]
    assert "unknown field" in found[("body", "work_dir")]
    assert ("body", "rank") in refused(client, adapter_type="lora-xs", rank=40)


def test_fields_that_would_fill_the_memory_of_server_or_trainer_are_refused(client):
    (place,) = refused(client, include=["x" * 300_000])
    assert place == ("body",)
    assert refused(client, include=[[]] * 150_000)[("body",)] == "more than 100000 values"
    found = refused(client, **{f"field{number}": 1 for number in range(9000)})
    assert len(found) == 20
    for pattern in ("layers.[0-999999999].", "[0-99][0-99][0-99][0-99]"):
        assert "expands to more than 10000 names" in refused(client, include=[pattern])[("body", "include")]
    assert list(refused(client, exclude=["[1-99]"] * 200)) == [("body", "exclude")]


HUGE = b'{"audio_data_url": "https://example.org/x.zip", "include": [1e999]}'


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"seed": NaN}', b'"a"', b'{"include": ["\\ud800"]}', b"[" * 9999, HUGE]
)
def test_a_body_that_is_no_json_object_is_a_422(client, body):
    assert client.post(f"/{DEFAULT_APP}", content=body).status_code == 422


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/x.zip",
        "http://localhost:1/x.zip",
        "http://[::1]/x.zip",
        "http://[::ffff:127.0.0.1]/x",
        "http://169.254.169.254/latest",
        "http://10.0.0.1/x",
        "http://0.0.0.0/x",
        "http://2130706433/x",
        "http://0x7f.1/x",
        "http://[64:ff9b::7f00:1]/x",
        "http://[2002:7f00:1::]/x",
        "http://[fd00::1]/x",
        "http://224.0.0.1/x",
        "file:///etc/passwd",
        "/etc/passwd",
        "~root",
        "s3://bucket/x",
        "http://[::1",
    ],
)
def test_addresses_that_point_inward_or_to_files_are_refused(client, address):
    assert list(refused(client, audio_data_url=address)) == [("body", "audio_data_url")]
    assert list(refused(client, lora_checkpoint_url=address)) == [("body", "lora_checkpoint_url")]
    if address.startswith("http"):
        answer = client.post(f"/{DEFAULT_APP}", params={"fal_webhook": address}, json=REQUEST)
        assert answer.json()["detail"][0]["loc"] == ["query", "fal_webhook"]


def test_an_upload_in_parts_is_joined_and_read_from_the_store(client, store):
    words = {"content_type": "application/zip", "file_name": "../../etc/my clips.zip"}
    made = client.post("/rest/storage/upload/initiate-multipart", json=words).json()
    assert made["file_url"].endswith("/my_clips.zip")
    address, _, signed = made["upload_url"].partition("?")
    parts = [client.put(f"{address}/{number}?{signed}", content=data) for number, data in ((2, b"cd"), (1, b"ab"))]
    assert [part.json()["partNumber"] for part in parts] == [2, 1]
    done = client.post(f"{address}/complete?{signed}", json={"parts": [part.json() for part in parts]})
    assert done.status_code == 200
    assert client.get(made["file_url"]).content == b"abcd"
    job = store.get(submit(client, {**REQUEST, "audio_data_url": made["file_url"]}).json()["request_id"])
    with open(job.settings["audio_data_url"], "rb") as stored:
        assert stored.read() == b"abcd"


def test_the_head_of_a_file_is_that_of_its_download_and_reads_nothing(client, monkeypatch):
    file = client.put("/files/a.zip", content=b"abc").json()["url"]
    whole = client.get(file)
    monkeypatch.setattr(client.app.state.service.files, "open", None)
    head = client.head(file)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-type", "content-disposition"):
        assert head.headers[name] == whole.headers[name]


def test_a_disk_that_cannot_be_written_to_is_named(client, monkeypatch):
    def fail(*words):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/srv/files")

    monkeypatch.setattr(client.app.state.service.files, "writing", fail)
    answer = client.put("/files/a.zip", content=b"abc")
    text = "the server cannot store files now: Read-only file system"
    assert (answer.status_code, answer.json()["detail"]) == (507, text)


@pytest.mark.parametrize("text", ["[" * 3000, "3", '{"expiration_duration_seconds": 1e999}', '"', "[]"])
def test_a_lifecycle_that_is_none_keeps_the_file(client, text):
    file = client.put("/files/a.zip", content=b"abc", headers={"X-Fal-Object-Lifecycle": text}).json()["url"]
    assert client.get(file).content == b"abc"


def test_files_and_jobs_are_seen_by_the_key_that_made_them_alone(keyed):
    client, one, two, boss = keyed
    assert submit(client).status_code == 401
    assert submit(client, headers={"Authorization": "Key 0:0"}).status_code == 401
    file = client.put("/files/clips.zip", content=b"abc", headers=one).json()["url"]
    assert [client.get(file, headers=who).status_code for who in (one, two, boss, {})] == [200, 404, 200, 401]
    stolen = submit(client, {**REQUEST, "audio_data_url": file}, headers=two)
    assert stolen.json()["detail"][0]["msg"] == "no such file here, or not yours"
    made = submit(client, headers=one).json()
    assert [client.get(made["status_url"], headers=who).status_code for who in (one, two, boss)] == [202, 404, 202]
    assert client.put(made["cancel_url"], headers=two).status_code == 404


def test_the_proxy_route_leads_to_our_own_routes_alone(client):
    def through(target):
        return client.post("/api/fal/proxy", json=REQUEST, headers={"x-fal-target-url": target})

    assert through(f"https://queue.fal.run/{DEFAULT_APP}").json()["status"] == "IN_QUEUE"
    inward = (
        "http://queue.fal.run/x",
        "https://127.0.0.1/",
        "https://fal.run@evil.test/",
        "https://evil.test/",
        "",
        "[",
    )
    # The address of older clients' uploads.
    assert "upload_url" in through("https://rest.alpha.fal.ai/storage/upload/initiate").json()
    for target in inward:
        assert through(target).status_code == 400, target


def test_the_hosted_endpoints_own_names_lead_here_and_answers_lead_to_the_public_address(client, options):
    for host in ("queue.fal.run", "queue.falrun.com"):
        made = submit(client, headers={"Host": host}).json()
        assert made["status_url"].startswith(f"{options.public_url}/{DEFAULT_APP}/requests/")
    assert client.post("/storage/auth/token", json={}, headers={"Host": "rest.fal.ai"}).status_code == 200


def test_what_is_too_long_is_refused_before_it_is_read(client):
    answer = client.post(f"/{DEFAULT_APP}", content=b"{}", headers={"Content-Length": str(10 << 30)})
    assert answer.status_code == 413
    assert client.post(f"/{DEFAULT_APP}", content=b"x" * (1 << 20) + b"x").status_code == 413


def test_below_the_free_space_that_was_asked_for_submits_are_refused(options, store):
    with TestClient(create_app(dataclasses.replace(options, min_free_bytes=1 << 60), store)) as client:
        answer = submit(client)
    assert answer.status_code == 507
    assert "would stay free here" in answer.json()["detail"]


def test_an_open_server_answers_no_page_of_another_site(client):
    assert submit(client, headers={"Origin": "https://evil.test"}).status_code == 403
    assert submit(client, headers={"Host": "evil.test"}).status_code == 403


def test_a_webhooks_signature_fits_the_published_key(client, store):
    service = client.app.state.service
    job = store.cancel(submit(client).json()["request_id"])
    body = wire.webhook_body(service, job)
    headers = webhooks.signed_headers(service.signer, job.id, job.key, body)
    signed = [headers[f"X-Fal-Webhook-{name}"] for name in ("Request-Id", "User-Id", "Timestamp")]
    (key,) = client.get("/.well-known/jwks.json").json()["keys"]
    public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "="))
    text = "\n".join([*signed, hashlib.sha256(body).hexdigest()])
    public.verify(bytes.fromhex(headers["X-Fal-Webhook-Signature"]), text.encode())
    assert (json.loads(body)["status"], json.loads(body)["error"]) == ("ERROR", "Invalid status code: 499")


def test_a_deleted_job_takes_the_upload_that_it_alone_read_with_it(client):
    made = submit(client).json()
    client.put(made["cancel_url"])
    file = client.app.state.service.store.get(made["request_id"]).request["audio_data_url"]
    assert client.get(file).status_code == 200
    assert client.delete(made["response_url"]).json() == {"status": "DELETED"}
    assert client.get(made["status_url"]).status_code == 404
    assert client.get(file).status_code == 404


def test_a_stream_of_a_finished_request_ends(client):
    made = submit(client).json()
    client.put(made["cancel_url"])
    with client.stream("GET", made["status_url"] + "/stream") as stream:
        (line,) = [line for line in stream.iter_lines() if line]
    assert json.loads(line.removeprefix("data: "))["status"] == "COMPLETED"


def test_a_trainer_that_may_not_look_inward_does_not(monkeypatch, tmp_path):
    monkeypatch.setenv(PUBLIC_ONLY_VARIABLE, "1")
    with hostile_http(b"secret") as server:
        for address in (server.url, server.url.replace("127.0.0.1", "localhost")):
            with pytest.raises(DataError, match="points to this machine"):
                fetch(f"{address}/etag/x.zip", tmp_path, lambda: False)
        assert server.requests == []


def test_headers_say_how_often_a_job_is_tried_again_and_what_it_is_called(client, store, caplog):
    def retries(seed, **headers):
        made = submit(
            client, {**REQUEST, "seed": seed}, headers={"X-Fal-" + name: text for name, text in headers.items()}
        )
        return (
            store.get(made.json()["request_id"]).retries if made.status_code == 200 else made.json()["detail"][0]["loc"]
        )

    config = "Retry-Config"
    assert retries(1) == 10
    assert retries(2, **{config: '{"server_error": {"retries": 3}, "timeout": {"retries": 7}}'}) == 3
    assert retries(3, **{config: '{"server_error": {"retries": 3}}', "No-Retry": "true"}) == 0
    for number, text in enumerate(("3", "{", '{"timeout": 3}', '{"timeout": {"retries": -1}}'), 4):
        assert retries(number, **{config: text}) == ["header", "x-fal-retry-config"]
    with caplog.at_level("INFO"):
        assert retries(9, Tags="team=sound", **{"Runner-Hint": "warm"}) == 10
    row = [record for record in caplog.records if record.name.startswith("sa3dist")][-1].fields
    assert (row["tags"], row["hint"]) == ("team=sound", "warm")
