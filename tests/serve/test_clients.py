"""The hosted endpoint's clients, unmodified, against a started server: each trains, cancels, uploads and is refused."""

import base64
import contextlib
import functools
import hashlib
import http.server
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors import safe_open

from tests.helpers.golden import ROOT
from tests.helpers.tools import need
from tests.helpers.web_server import DEADLINE, serving

pytestmark = pytest.mark.slow
# Where make test-services puts the clients.
CLIENTS = ROOT / ".venv" / "clients"
PROGRAMS = Path(__file__).parent / "clients"


@contextlib.contextmanager
def receiving():
    """A receiver of webhooks: .url, and .calls as (headers, body)."""

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.calls.append((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as running:
        running.calls, running.url = [], f"http://127.0.0.1:{running.server_port}/hook"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def last_line(command: list[str], folder: Path, **environment: str) -> dict:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=4 * DEADLINE
    )
    assert done.returncode == 0, done.stderr[-3000:] + "".join(
        log.read_text()[-2000:] for log in folder.glob("server-*.log")
    )
    return json.loads(done.stdout.splitlines()[-1])


def check_signature(call, server: str, authority: Path) -> dict:
    """The body of a webhook whose signature fits the server's published key."""
    headers, body = call
    context = ssl.create_default_context(cafile=authority)
    with urllib.request.urlopen(f"{server}/.well-known/jwks.json", context=context) as answer:
        (key,) = json.load(answer)["keys"]
    public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "="))
    words = [headers[f"X-Fal-Webhook-{name}"] for name in ("Request-Id", "User-Id", "Timestamp")]
    text = "\n".join([*words, hashlib.sha256(body).hexdigest()])
    public.verify(bytes.fromhex(headers["X-Fal-Webhook-Signature"]), text.encode())
    return json.loads(body)


@pytest.mark.parametrize("version", ["newest", "1.0.0"])
def test_the_python_client_trains_cancels_uploads_and_is_refused(version, tmp_path, demo_base, demo_clips):
    client = CLIENTS / f"fal-client-{version}"
    need(client.is_dir(), f"fal-client {version}")
    with receiving() as receiver, serving(tmp_path, demo_base, "--tls", "--allow-private-webhooks") as server:
        authority = tmp_path / "data" / "tls" / "ca.pem"
        host = server.partition("://")[2]
        hosts = {"FAL_RUN_HOST": f"{host}/run", "FAL_QUEUE_RUN_HOST": host, "FAL_KEY": "local:none"}
        command = [sys.executable, str(PROGRAMS / "train.py"), server, receiver.url, str(demo_clips)]
        seen = last_line(command, tmp_path, **hosts, SSL_CERT_FILE=str(authority), PYTHONPATH=str(client))
        deadline = time.monotonic() + DEADLINE
        while not receiver.calls and time.monotonic() < deadline:
            time.sleep(0.1)
        told = check_signature(receiver.calls[0], server, authority)
    assert version in ("newest", seen["version"])
    assert seen["updates"][-1] == "Completed"
    assert seen["logs"] > 0
    with safe_open(tmp_path / "lora.safetensors", "pt") as adapter:
        assert len(list(adapter.keys())) > 0
    assert {"config_file", "lora_file"} <= set(seen["run"])
    assert (seen["refused"], seen["unknown"]) == (422, 404)
    assert (seen["waiting"], seen["cancelled_queued"], seen["cancelled_running"]) == ("Queued", 499, 499)
    assert seen["streamed"] == "Completed"
    assert (seen["small_is_whole"], seen["large_is_whole"]) == (True, True)
    assert seen["asynchronous"] == {"end": "Completed", "files": seen["run"], "small_is_whole": True}
    assert (told["request_id"], told["status"]) == (seen["request"], "ERROR")


def test_the_javascript_client_trains_cancels_uploads_and_is_refused(tmp_path, demo_base, demo_clips):
    need(shutil.which("node") and (CLIENTS / "node_modules").is_dir(), "node and @fal-ai/client")
    with serving(tmp_path, demo_base) as server:
        command = ["node", str(PROGRAMS / "train.mjs"), str(CLIENTS), server, str(demo_clips)]
        seen = last_line(command, tmp_path)
    assert seen["updates"][-1] == "COMPLETED"
    assert seen["logs"] > 0
    assert seen["lora"] == seen["size"] > 0
    assert len(seen["requestId"]) == 32
    assert seen["refused"] == [422, ["body", "rank"]]
    assert seen["unknown"] == 404
    assert seen["streamed"][-1] == "COMPLETED"
    assert seen["large"] == 130 << 20


def curl(*words: str) -> dict:
    """What curl prints."""
    done = subprocess.run(["curl", "--silent", "--show-error", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def ended(server: str, folder: Path, **request) -> tuple[int, dict]:
    """Status and body of a request's result, after curl has sent it and asked until it had ended."""
    words = {"number_of_steps": 2, "rank": 4, "base_precision": "fp32", "duration": 2, **request}
    (folder / "request.json").write_text(json.dumps(words))
    body = ["-H", "Content-Type: application/json", "-d", f"@{folder / 'request.json'}"]
    made = curl("-X", "POST", f"{server}/fal-ai/stable-audio-3-trainer", *body)
    deadline = time.monotonic() + DEADLINE
    while curl(made["status_url"])["status"] != "COMPLETED":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    command = ["curl", "--silent", "--write-out", "\n%{http_code}", made["response_url"]]
    answer, _, code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition("\n")
    return int(code), json.loads(answer)


@contextlib.contextmanager
def offering(folder: Path):
    """The address of a server of the folder's files."""

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Files, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(scope="module")
def plain(tmp_path_factory, demo_base):
    """A server without a key, and the folder of its data."""
    need(shutil.which("curl"), "curl")
    folder = tmp_path_factory.mktemp("plain")
    with serving(folder, demo_base, "--allow-private-data") as server:
        yield server, folder / "data"


def test_curl_alone_uploads_trains_and_downloads(plain, tmp_path, demo_clips):
    server, _ = plain
    clips = curl("--upload-file", str(demo_clips), f"{server}/files/")["url"]
    code, result = ended(server, tmp_path, audio_data_url=clips)
    assert code == 200
    adapter = tmp_path / "lora.safetensors"
    subprocess.run(["curl", "--silent", "--output", str(adapter), result["lora_file"]["url"]], check=True)
    assert adapter.stat().st_size == result["lora_file"]["file_size"]
    with safe_open(adapter, "pt") as file:
        assert len(list(file.keys())) > 0


def test_curl_with_the_hosted_address_is_led_here(tmp_path, demo_base):
    need(shutil.which("curl"), "curl")
    with serving(tmp_path, demo_base, "--tls") as server:
        port = server.rpartition(":")[2]
        here = ["--connect-to", f"queue.fal.run:443:127.0.0.1:{port}", "--cacert", str(tmp_path / "data/tls/ca.pem")]
        body = json.dumps({"audio_data_url": "data:,x", "number_of_steps": 20000})
        made = curl(*here, "-X", "POST", "https://queue.fal.run/fal-ai/stable-audio-3-trainer", "-d", body)
        assert made["status_url"].startswith(f"{server}/")
        assert curl(*here, "-X", "PUT", made["cancel_url"])["status"] in ("CANCELLATION_REQUESTED", "ALREADY_COMPLETED")


@pytest.mark.parametrize("way", ["data", "url"])
def test_a_zip_bomb_is_refused_in_a_line_and_leaves_nothing(way, plain, tmp_path):
    server, data = plain
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        for number in range(4):
            bomb.writestr(f"{number}.txt", "a kick")
            bomb.writestr(f"{number}.wav", bytes(200 << 20))
    before = {path for path in data.rglob("*") if not path.is_relative_to(data / "jobs")}
    with offering(tmp_path) as address:
        content = base64.b64encode((tmp_path / "bomb.zip").read_bytes()).decode()
        ways = {"url": f"{address}/bomb.zip", "data": f"data:;base64,{content}"}
        code, answer = ended(server, tmp_path, audio_data_url=ways[way])
    assert (code, len(answer["detail"])) == (422, 1)
    (refused,) = answer["detail"]
    assert refused["loc"] == ["body", "audio_data_url"]
    assert "no audio does" in refused["msg"]
    left = {path for path in data.rglob("*") if not path.is_relative_to(data / "jobs")} - before
    # The request's own file goes when it is deleted; of what was unpacked there is nothing.
    assert {path.suffix for path in left if path.is_file()} <= {".data", ".json"}
    assert sum(path.stat().st_size for path in left if path.is_file()) < 2 << 20
    assert not [path for path in left if path.name in ("shards", "downloads")]
