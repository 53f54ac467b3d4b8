"""Clients that send slowly, half, too much or without end: answered in a line, within time, and nothing is kept."""

import contextlib
import json
import socket
import threading
import time
import urllib.request

import pytest

from sa3dist.serve import connections, service
from tests.helpers.endpoint import PATH, application, listening

SILENT_SECONDS, HEAD_SECONDS = 0.4, 0.8
LIMIT = 1 << 16


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The port of a server with little patience, and where it keeps files."""
    data = tmp_path_factory.mktemp("data")
    patient, connections.HEAD_SECONDS = connections.HEAD_SECONDS, HEAD_SECONDS
    try:
        limits = {"silent_seconds": SILENT_SECONDS, "max_upload_bytes": LIMIT, "max_body_bytes": LIMIT}
        with application(data, **limits) as (app, _), listening(app) as port:
            yield port, data / "files"
    finally:
        connections.HEAD_SECONDS = patient


def head(method: str, path: str, **headers) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).replace("_", "-").encode() + b"\r\n\r\n"


def answer_to(port: int, *pieces: bytes, pause: float = 0.0) -> tuple[int, bytes]:
    """Status and all of the answer, up to the end of the connection, which the server has to bring about."""
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        for piece in pieces:
            with contextlib.suppress(OSError):
                client.sendall(piece)
            time.sleep(pause)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while block := client.recv(1 << 16):
                answer += block
    return int(answer.split()[1]) if answer else 0, answer


def nothing_kept(files) -> bool:
    """Waits for the server to see that its client is gone."""
    deadline = time.monotonic() + 20
    while list(files.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not list(files.iterdir())


def still_answers(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=20) as answer:
        return answer.status == 200


@pytest.mark.parametrize("path", ["/files/clips.zip", PATH])
def test_a_body_that_stops_is_given_up_with_what_came_of_it(served, path):
    method = "PUT" if path.startswith("/files") else "POST"
    status, answer = answer_to(served[0], head(method, path, Content_Length=1000), b"PK\3\4 half")
    assert status == 408
    assert b"comes too slowly" in answer
    assert nothing_kept(served[1])


def test_a_body_that_drips_is_given_up_though_it_never_stops(served):
    drops = [b"x"] * 12
    sent = head("PUT", "/files/clips.zip", Content_Length=1000), *drops
    status, _ = answer_to(served[0], *sent, pause=SILENT_SECONDS / 4)
    assert status == 408
    assert nothing_kept(served[1])


def test_large_requests_that_come_slowly_delay_no_other(tmp_path):
    with (
        application(tmp_path, silent_seconds=600.0) as (app, _),
        listening(app) as port,
        contextlib.ExitStack() as slow,
    ):
        begun = head("POST", PATH, Content_Length=2 << 20) + b'{"audio_data_url": "'
        for _ in range(service.MAX_LARGE_BODIES):
            slow.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(begun)
        body = json.dumps({"audio_data_url": "https://example.org/x.zip", "include": ["x" * (2 << 20)]}).encode()
        status, answer = answer_to(port, head("POST", PATH, Content_Length=len(body), Connection="close"), body)
        assert (status, b"bytes beside data: URIs" in answer) == (422, True)


def test_an_upload_whose_client_is_gone_leaves_nothing(served):
    port, files = served
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head("PUT", "/files/clips.zip", Content_Length=1000) + b"half")
        deadline = time.monotonic() + 20
        while not list(files.iterdir()):
            assert time.monotonic() < deadline
    assert nothing_kept(files)
    assert still_answers(port)


@pytest.mark.parametrize(("method", "path"), [("POST", PATH), ("PUT", "/files/clips.zip"), ("POST", "/run" + PATH)])
def test_ten_gigabytes_are_refused_before_a_byte_of_them_is_there(served, method, path):
    status, answer = answer_to(served[0], head(method, path, Content_Length=10 << 30))
    assert status == 413
    assert b"longer than" in answer
    assert nothing_kept(served[1])


@pytest.mark.parametrize(("method", "path"), [("POST", PATH), ("PUT", "/files/clips.zip")])
def test_a_body_that_does_not_say_its_length_ends_at_the_bound(served, method, path):
    chunk = b"4000\r\n" + bytes(0x4000) + b"\r\n"
    status, _ = answer_to(served[0], head(method, path, Transfer_Encoding="chunked"), *[chunk] * 8)
    assert status == 413
    assert nothing_kept(served[1])


def test_a_head_that_does_not_end_is_cut_off(served):
    begin = time.monotonic()
    assert answer_to(served[0], b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X-Slow: 1\r\n", pause=0.1) == (0, b"")
    assert time.monotonic() - begin < 15
    assert still_answers(served[0])


@pytest.mark.parametrize("line", [b"X-Long: " + bytes([120]) * 40_000, b"X-Many: x\r\n" * 4_000])
def test_a_head_without_end_is_refused_before_it_fills_the_memory(served, line):
    begin = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    status, answer = answer_to(served[0], begin, line, line, pause=0.1)
    assert (status, b"longer than 65536 bytes" in answer) == (400, True)
    assert still_answers(served[0])


@pytest.mark.parametrize("line", [b"X-Long: " + bytes([120]) * 70_000 + b"\r\n", b"X-Many: x\r\n" * 6_500])
@pytest.mark.parametrize("size", [1 << 30, 40_000])
def test_a_head_that_is_too_long_is_refused_however_it_is_cut(served, line, size):
    sent = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n"
    status, answer = answer_to(served[0], *(sent[at : at + size] for at in range(0, len(sent), size)))
    assert (status, b"longer than 65536 bytes" in answer) == (400, True)
    for path in (b"/healthz?" + bytes([120]) * 70_000, b"/healthz?" + bytes([120]) * 60_000):
        begin = b"GET " + path + b" HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n\r\n"
        assert answer_to(served[0], begin)[0] == (400 if len(path) > 65536 else 200)
    assert still_answers(served[0])


def test_several_requests_at_once_are_answered_in_turn(served):
    one = head("GET", "/healthz")
    status, answer = answer_to(served[0], one * 3)
    assert (status, answer.count(b"HTTP/1.1 200")) == (200, 3)


def test_an_upload_that_would_fill_the_disk_is_refused_before_and_on_the_way(tmp_path, monkeypatch):
    free = [50_000]
    usage = type("Usage", (), {"free": property(lambda self: free[0])})
    monkeypatch.setattr(service.shutil, "disk_usage", lambda folder: usage())
    with application(tmp_path, min_free_bytes=40_000) as (app, _), listening(app) as port:
        address = f"http://127.0.0.1:{port}/files/clips.zip"

        def put(data: object) -> int:
            try:
                return urllib.request.urlopen(urllib.request.Request(address, data, method="PUT"), timeout=20).status
            except urllib.error.HTTPError as refused:
                return refused.code

        def growing():
            yield b"x" * 100
            free[0] = 30_000
            yield b"x" * 100

        assert put(bytes(9_000)) == 200
        kept = len(list((tmp_path / "files").iterdir()))
        assert put(bytes(20_000)) == 507
        assert put(growing()) == 507
    assert len(list((tmp_path / "files").iterdir())) == kept


def test_the_rest_of_a_body_that_was_refused_is_no_connection_for_ever(served):
    with socket.create_connection(("127.0.0.1", served[0]), 20) as client:
        client.sendall(head("POST", PATH, Content_Length=10 << 30))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 413")
        ended = threading.Event()

        def drip():
            while not ended.wait(0.1):
                with contextlib.suppress(OSError):
                    client.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        finally:
            ended.set()
            dripping.join()
