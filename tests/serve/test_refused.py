"""What one client may not see or reach of another, of this machine and its network; and what a log says of it."""

import functools
import http.server
import json
import logging
import socket
import threading
import time

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from sa3dist.data.remote import public_addresses
from sa3dist.data.remote.fetch import fetch
from sa3dist.data.remote.public_addresses import PUBLIC_ONLY_VARIABLE
from sa3dist.errors import DataError
from sa3dist.serve import service, submission, webhooks
from sa3dist.serve.keys import Keys
from sa3dist.serve.tables import deliveries
from tests.helpers.endpoint import PATH, REQUEST, application, key_headers

INWARD = ["127.1", "0177.0.0.1", "0x7f000001", "017700000001", "localhost.", "LOCALHOST", "127.0.0.1.", "[::]"]
INWARD += [
    "[::ffff:7f00:1]",
    "[::ffff:169.254.169.254]",
    "[fe80::1]",
    "[::127.0.0.1]",
    "[2001::1]",
    "user:word@127.0.0.1",
]
INWARD += [
    "100.64.0.1",
    "198.18.0.1",
    "192.168.1.1",
    "172.16.0.1",
    "255.255.255.255",
    "[ff02::1]",
    "\uff11\uff12\uff17.0.0.1",
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A client of a server that needs no key."""
    with application(tmp_path_factory.mktemp("data")) as (app, _), TestClient(app) as client:
        yield client


@pytest.mark.parametrize("host", INWARD)
def test_every_spelling_of_an_inward_address_is_refused_for_data_and_webhooks(opened, host):
    for field in ("audio_data_url", "lora_checkpoint_url"):
        answer = opened.post(PATH, json={**REQUEST, field: f"http://{host}/x.zip"})
        assert [item["loc"] for item in answer.json()["detail"]] == [["body", field]], answer.text
    answer = opened.post(PATH, params={"fal_webhook": f"http://{host}/x"}, json=REQUEST)
    assert [item["loc"] for item in answer.json()["detail"]] == [["query", "fal_webhook"]]


@pytest.mark.parametrize("value", [5, 1e308, True, ["http://example.com/x"], {"url": "x"}])
def test_what_is_no_text_is_no_address(opened, value):
    answer = opened.post(PATH, json={**REQUEST, "audio_data_url": value})
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "audio_data_url"])


class Listener(http.server.BaseHTTPRequestHandler):
    """Notes what it is asked; redirects to where the server says."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(302 if self.server.leads_to else 200)
        self.send_header("Location", self.server.leads_to or "")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET
    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def listener():
    """Starts a server at an address of loopback."""
    started = []

    def start(address: str = "127.0.0.1", leads_to: str = ""):
        server = http.server.ThreadingHTTPServer((address, 0), Listener)
        server.asked, server.leads_to = [], leads_to
        started.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def rebound(monkeypatch):
    """A name that is public when it is looked up first, and this machine from then on."""
    known, asked = socket.getaddrinfo, []

    def look_up(host, port, *words, **more):
        if host not in ("rebound.test", b"rebound.test"):
            return known(host, port, *words, **more)
        asked.append(host)
        return known("93.184.216.34" if len(asked) == 1 else "127.0.0.1", port, *words, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a_name_that_turns_inward_after_the_check_is_not_connected_to(rebound, listener, monkeypatch, tmp_path):
    inside = listener()
    address = f"http://rebound.test:{inside.server_port}/clips.zip"
    with application(tmp_path) as (app, store), TestClient(app) as client:
        assert client.post(PATH, json={**REQUEST, "audio_data_url": address}).status_code == 200
        (job,) = store.list()
    assert job.settings["public_addresses_only"] is True
    monkeypatch.setenv(PUBLIC_ONLY_VARIABLE, "1")
    with pytest.raises(DataError, match="points to this machine"):
        fetch(address, tmp_path / "downloads", lambda: False)
    assert len(rebound) > 1
    assert inside.asked == []


def test_names_that_nobody_answers_for_keep_no_other_client_waiting(tmp_path, monkeypatch):
    known, answered = socket.getaddrinfo, threading.Event()

    def look_up(host, *words, **more):
        if str(host).endswith("slow.test"):
            answered.wait(30)
            raise socket.gaierror("not known")
        return known(host, *words, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(submission, "RESOLVE_SECONDS", 0.2)
    with application(tmp_path) as (app, store), TestClient(app) as client:
        try:
            for number in range(service.RESOLVERS + 2):
                asked = {**REQUEST, "audio_data_url": f"http://{number}.slow.test/x.zip"}
                assert client.post(PATH, json=asked).status_code == 200
            # Reading and writing goes on beside them.
            assert client.put("/files/clips.zip", content=b"abc").status_code == 200
            assert len(store.list()) == service.RESOLVERS + 2
        finally:
            answered.set()


def test_a_redirect_to_this_machine_is_not_followed(listener, monkeypatch, tmp_path):
    inside = listener()
    outside = listener("127.0.0.2", f"http://127.0.0.1:{inside.server_port}/secret")
    is_public = public_addresses.is_public
    # Stands for a server of the open internet.
    monkeypatch.setattr(public_addresses, "is_public", lambda address: address == "127.0.0.2" or is_public(address))
    monkeypatch.setenv(PUBLIC_ONLY_VARIABLE, "1")
    with pytest.raises(DataError, match="points to this machine"):
        fetch(f"http://127.0.0.2:{outside.server_port}/clips.zip", tmp_path, lambda: False)
    assert outside.asked != []
    assert inside.asked == []


def delivered(store) -> tuple[int, str | None]:
    """Tries and the last error of the one webhook, once there is one."""
    deadline = time.monotonic() + 30
    while True:
        with store.database.reading() as connection:
            row = connection.execute(select(deliveries.c.tries, deliveries.c.error, deliveries.c.delivered)).one()
        if row.error is not None or row.delivered is not None:
            return row.tries, row.error
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_webhooks_name_that_turns_inward_after_the_check_is_not_called(rebound, listener, tmp_path):
    inside = listener()
    hook = f"http://rebound.test:{inside.server_port}/hook"
    with application(tmp_path) as (app, store), TestClient(app) as client:
        client.put(client.post(PATH, params={"fal_webhook": hook}, json=REQUEST).json()["cancel_url"])
        tries, error = delivered(store)
    assert (tries, "points to this machine" in error) == (1, True)
    assert inside.asked == []


def test_a_webhook_is_not_redirected(listener, tmp_path):
    inside = listener()
    outside = listener("127.0.0.1", f"http://127.0.0.1:{inside.server_port}/secret")
    hook = f"http://127.0.0.1:{outside.server_port}/hook"
    with application(tmp_path, allow_private_webhooks=True) as (app, store), TestClient(app) as client:
        client.put(client.post(PATH, params={"fal_webhook": hook}, json=REQUEST).json()["cancel_url"])
        assert delivered(store) == (1, "status 302")
    assert (outside.asked, inside.asked) == (["/hook"], [])


def test_receivers_of_webhooks_that_never_answer_delay_no_other(listener, tmp_path, monkeypatch):
    monkeypatch.setattr(webhooks, "TRY_SECONDS", 600.0)
    answers = listener()
    with socket.create_server(("127.0.0.1", 0)) as silent, application(tmp_path, allow_private_webhooks=True) as opened:
        app, store = opened
        ports = [silent.getsockname()[1]] * 25 + [answers.server_port]
        for port in ports:
            hook = f"http://127.0.0.1:{port}/hook"
            store.cancel(store.submit(REQUEST, app=PATH[1:], key="k", webhook=hook).id)
        with TestClient(app):
            deadline = time.monotonic() + 60
            while not answers.asked:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_nothing_of_one_key_is_there_for_another(tmp_path):
    one, two, boss = (key_headers(tmp_path, name, scope) for name, scope in USERS)
    with application(tmp_path, is_open=False) as (app, store), TestClient(app) as client:
        file = client.put("/files/clips.zip", content=b"abc", headers=one).json()["url"]
        parts = client.post("/files/upload/multipart", headers=one).json()
        parts = f"{parts['access_url']}/multipart/{parts['uploadId']}"
        made = client.post(PATH, json={**REQUEST, "audio_data_url": file}, headers=one).json()
        job = store.get(made["request_id"])
        lora = job.folder / "attempt-1/run/lora.safetensors"
        lora.parent.mkdir(parents=True)
        lora.write_bytes(b"lora")
        with store.database.writing() as connection:
            result = {"lora_file": {"path": "attempt-1/run/lora.safetensors", "url": "file:///x"}}
            values = {"state": "SUCCEEDED", "result": result, "finished": time.time(), "updated": time.time()}
            connection.exec_driver_sql(
                "UPDATE jobs SET state = ?, result = ?, finished = ?, updated = ?, revision = 1",
                tuple(json.dumps(value) if isinstance(value, dict) else value for value in values.values()),
            )
        wait_for(lambda: client.get(made["status_url"], headers=one).status_code == 200)
        link = client.get(made["response_url"], headers=one).json()["lora_file"]["url"]
        bare = link.partition("?")[0]
        routes = [("GET", file), ("GET", bare), ("PUT", f"{parts}/1"), ("POST", f"{parts}/complete")]
        routes += [("GET", made["status_url"]), ("GET", f"{made['status_url']}/stream"), ("GET", made["response_url"])]
        routes += [("PUT", made["cancel_url"]), ("DELETE", made["response_url"])]
        routes += [("GET", f"/api/jobs/{job.id}"), ("GET", f"/api/jobs/{job.id}/progress")]
        for method, route in routes:
            refused = client.request(method, route, headers=two)
            assert refused.status_code == 404, route
            assert "\n" not in refused.json()["message"]
            assert client.request(method, route).status_code == 401, route
        assert client.get("/api/jobs", headers=two).json()["jobs"] == []
        assert len(client.get("/api/jobs", headers=one).json()["jobs"]) == 1
        for field in ("audio_data_url", "lora_checkpoint_url"):
            for address in (file, bare, link + "0"):
                stolen = client.post(PATH, json={**REQUEST, field: address}, headers=two).json()["detail"]
                assert [item["msg"] for item in stolen] == ["no such file here, or not yours"]
        assert client.get(bare, headers=boss).content == b"lora"
        # The address that was given away is all that its holder needs.
        assert client.get(link).content == b"lora"


USERS = [("one", "submit"), ("two", "submit"), ("boss", "admin")]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_guessed_keys_are_refused_and_the_log_says_who_tried(tmp_path, caplog):
    known = key_headers(tmp_path, "one")["Authorization"]
    guesses = ["", "Key ", "Key x", known[:-1], known + "0", known.replace(":", ":0"), "Basic a:b", known.split(":")[0]]
    with application(tmp_path, is_open=False) as (app, _), TestClient(app) as client, caplog.at_level(logging.INFO):
        for guess in guesses:
            answer = client.post(PATH, json=REQUEST, headers={"Authorization": guess})
            assert (answer.status_code, answer.json()["detail"]) == (401, "invalid key credentials")
        assert client.post(PATH, json=REQUEST, headers={"Authorization": known}).status_code == 200
    rows = [entry.fields for entry in caplog.records if entry.message == "request"]
    assert [(row["status"], row["client"]) for row in rows] == [(401, "testclient")] * len(guesses) + [
        (200, "testclient")
    ]
    # What was tried, and the right one, is nowhere in it.
    assert known.split(":")[1][:20] not in caplog.text + repr(rows)


def test_a_token_for_uploads_uploads_alone_and_ends_with_its_key(tmp_path):
    one = key_headers(tmp_path, "one")
    with application(tmp_path, is_open=False) as (app, _), TestClient(app) as client:
        token = client.post("/rest/storage/auth/token", json={}, headers=one).json()["token"]
        bearer = {"Authorization": f"Bearer {token}"}
        send = functools.partial(client.post, "/files/upload", content=b"abc", headers=bearer)
        assert send().status_code == 200
        assert client.post(PATH, json=REQUEST, headers=bearer).status_code == 401
        Keys(tmp_path).remove(one["Authorization"].removeprefix("Key ").partition(":")[0])
        assert send().status_code == 401


def test_a_field_that_a_request_holds_twice_is_refused_as_in_a_config():
    with pytest.raises(service.WireError) as refused:
        submission.read_body(b'{"audio_data_url": "https://example.com/a.zip", "rank": 4, "rank": 8}')
    assert refused.value.status == 422
    assert refused.value.detail[0]["msg"] == "no valid JSON: rank: given more than once; keep one"
