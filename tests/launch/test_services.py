"""The endpoint as a service: unit, proxy and containers, as the programs read them that they are for."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from sa3dist.commands import serve
from sa3dist.serve.server_options import DEFAULT_APP
from tests.helpers.golden import ROOT
from tests.helpers.web_server import free_port, serving

UNIT = ROOT / "launch/systemd/sa3dist-serve.service"
CADDYFILE = ROOT / "launch/caddy/Caddyfile"
COMPOSE = ROOT / "docker/compose.serve.yaml"
MANIFEST = ROOT / "launch/kubernetes/endpoint.yaml"


def installed(*names: str) -> str:
    """The first of these programs that is here. None is the suite's own to install."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs {' or '.join(names)}")
    return found


def words_of(text: str) -> list[str]:
    return text.split("sa3dist serve", 1)[1].split()


def command_lines() -> dict[str, list[str]]:
    """What each of them starts the server with."""
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    sets = [document for document in yaml.safe_load_all(MANIFEST.read_text()) if document["kind"] == "StatefulSet"]
    (pod,) = [document["spec"]["template"]["spec"] for document in sets]
    composed = yaml.safe_load(COMPOSE.read_text())["services"]["serve"]
    assert composed["entrypoint"] == pod["containers"][0]["command"] == ["sa3dist", "serve"]
    return {"systemd": words_of(line), "compose": composed["command"], "kubernetes": pod["containers"][0]["args"]}


@pytest.mark.parametrize("where", ["systemd", "compose", "kubernetes"])
def test_the_server_knows_the_options_it_is_started_with(where):
    known = {name: words for name, words in serve.ARGUMENTS.items() if name.startswith("--")}
    words = [part for word in command_lines()[where] for part in word.split("=", 1)[:1] if word.startswith("--")]
    assert set(words) <= set(known), where


def test_systemd_finds_nothing_wrong_with_the_unit_and_leaves_jobs_alone(tmp_path):
    analyze = installed("systemd-analyze")
    text = UNIT.read_text()
    # Not installed there on this machine.
    (tmp_path / UNIT.name).write_text(text.replace("/opt/sa3dist/bin/sa3dist", "/bin/true"))
    done = subprocess.run([analyze, "verify", "--man=no", tmp_path / UNIT.name], capture_output=True, text=True)
    # What it only warns of ends with 0.
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and line[0] not in "#[")
    assert settings["KillMode"] == "process"
    # Locks of the jobs that go on are there.
    assert "PrivateTmp" not in settings


def test_compose_takes_the_file_and_asks_for_a_password():
    program = installed("docker-compose")
    command = [program, "--file", COMPOSE, "config"]
    plain = {name: value for name, value in os.environ.items() if name != "POSTGRES_PASSWORD"}
    assert subprocess.run(command, env=plain, capture_output=True).returncode != 0
    done = subprocess.run(command, env=plain | {"POSTGRES_PASSWORD": "x"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)["services"]
    assert set(read) == {"postgres", "serve"}
    assert read["serve"]["environment"]["PGPASSWORD"] == read["postgres"]["environment"]["POSTGRES_PASSWORD"] == "x"


def test_events_and_large_bodies_pass_through_caddy(tmp_path):
    caddy = installed("caddy")
    with serving(tmp_path, None, "--slots", "0") as server:
        front = f"http://127.0.0.1:{free_port()}"
        text = CADDYFILE.read_text().replace("sound.example.org", front)
        text = text.replace("127.0.0.1:8000 {", f"{server.partition('://')[2]} {{")
        (tmp_path / "Caddyfile").write_text("{\n\tadmin off\n}\n" + text)
        command = [caddy, "run", "--adapter", "caddyfile", "--config", tmp_path / "Caddyfile"]
        environment = os.environ | {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
        proxy = subprocess.Popen(command, env=environment, stderr=(tmp_path / "caddy.log").open("wb"))
        try:
            with httpx.Client(base_url=front, timeout=60) as client:
                wait_for(client, proxy, tmp_path / "caddy.log")
                body = bytes(40 << 20)
                stored = client.put("/files/clips.zip", content=body).json()
                assert stored["file_size"] == len(body)
                assert client.get(stored["url"]).content == body
                made = client.post(f"/{DEFAULT_APP}", json={"audio_data_url": stored["url"]}).json()
                assert made["status_url"].startswith(front)
                # The stream stays open, and its first event is here.
                with client.stream("GET", made["status_url"] + "/stream") as stream:
                    line = next(stream.iter_lines())
                assert json.loads(line.removeprefix("data: "))["status"] == "IN_QUEUE"
                assert client.get("/metrics").status_code == 404
        finally:
            # It waits for open requests: the stream has ended with its client.
            proxy.terminate()
            proxy.wait(timeout=60)


def wait_for(client, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            client.get("/healthz")
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())
