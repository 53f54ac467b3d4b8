"""Runs on Kubernetes: made once, found again, deleted; each object is checked with the API's own models."""

import dataclasses
import http.server
import json
import os
import signal
import threading

import pytest
import yaml

from sa3dist.errors import ConfigError, EnvironmentFailure
from sa3dist.formats import write_json
from sa3dist.serve import cluster
from sa3dist.serve.executor import Attempt
from sa3dist.serve.job_store import JobStore
from sa3dist.serve.options import RunOptions
from sa3dist.serve.processes import Mark
from tests.helpers import kubernetes_api

PLACE = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/sound/jobsets"


class Api(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["metadata"]["name"]
        if self.path != PLACE or (wrong := kubernetes_api.lost(body)):
            return self._answer(422, {"reason": f"Invalid: {wrong}"})
        if name in self.server.objects:
            return self._answer(409, {"reason": "AlreadyExists"})
        self.server.made.append(name)
        self.server.objects[name] = body
        return self._answer(201, body)

    def do_GET(self):
        found = self.server.objects.get(self.path.rpartition("/")[2])
        self._answer(*(404, {}) if found is None else (200, found))

    def do_DELETE(self):
        found = self.server.objects.pop(self.path.partition("?")[0].rpartition("/")[2], None)
        self._answer(*(404, {}) if found is None else (200, found))

    def _answer(self, code: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words) -> None:
        """Nothing: the test says what went wrong."""


@pytest.fixture
def api(tmp_path, monkeypatch):
    # Here, because every process of the suite reads this file, and the API's models take a second to import.
    pytest.importorskip("kubernetes")
    pytest.importorskip("kubeflow_trainer_api.models")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.objects, server.made = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    parts = {
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **parts}))
    # What KUBECONFIG says was read when the client was imported.
    for module in ("kubernetes.config", "kubernetes.config.kube_config"):
        monkeypatch.setattr(f"{module}.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "STATUS_SECONDS", 0.0)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def attempt(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    job = store.submit({"audio_data_url": "https://example.org/a.zip"}, app="a", key="k")
    store.close()
    folder = job.folder / "cluster"
    (folder / "run").mkdir(parents=True)
    mark = Mark(str(tmp_path), str(store.folder), job.id, 1, ())
    return Attempt(job, folder, folder / "run", folder / "request.json", folder / "log.txt", 2, 1, mark, ())


def opened(*more: str):
    from sa3dist.serve.executors import open_executor

    words = ("namespace=sound", "image=registry/sa3dist:1", "claim=music", "mount=/music", *more)
    return open_executor(RunOptions("kubernetes", (0,), "/work", "/locks", "here", options=words))


def end(api, attempt, exit_code: int | None, state: str) -> None:
    if exit_code is not None:
        write_json(attempt.run / "status.json", {"exit_code": exit_code})
    (found,) = api.objects.values()
    found["status"] = {"terminalState": state}


def test_a_run_is_one_pod_of_the_shipped_manifest_with_its_own_settings(api, attempt):
    opened().start(attempt)
    ((name, made),) = api.objects.items()
    assert name == f"sa3dist-{attempt.job.id}"
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][-1] == str(attempt.request)
    assert container["image"] == "registry/sa3dist:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["livenessProbe"]["exec"]["command"] == ["sa3dist-alive", "60", str(attempt.run)]
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["data"] == "/music"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "music"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_several_nodes_are_as_many_pods_that_find_each_other(api, attempt):
    opened("cpu=8", "memory=64Gi").start(dataclasses.replace(attempt, nodes=3))
    ((name, made),) = api.objects.items()
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 3, 3)
    (container,) = job["template"]["spec"]["containers"]
    told = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert (told["PET_NNODES"], told["PET_NPROC_PER_NODE"]) == ("3", "2")
    # The first pod's name in the set's own domain.
    assert told["PET_MASTER_ADDR"] == f"{name}-node-0-0.{name}"
    assert container["resources"]["requests"] == {"cpu": "8", "memory": "64Gi"}
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 2}


def test_an_option_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="option: imag is unknown; kubernetes takes namespace=, image="):
        opened("imag=x")


def test_a_runner_that_follows_a_lost_one_finds_the_run_and_its_end(api, attempt):
    opened().start(attempt)
    second = opened()
    second.start(attempt)
    assert second.exit_code() is None
    end(api, attempt, 0, "Completed")
    # Lost again, between the end and its publication.
    third = opened()
    third.start(attempt)
    assert third.exit_code() == 0
    assert len(api.made) == 1


def test_an_attempt_after_a_failed_one_is_another_run_of_the_same_name(api, attempt):
    first = opened()
    first.start(attempt)
    end(api, attempt, 70, "Failed")
    assert first.exit_code() == 70
    second = opened()
    second.start(attempt)
    # What the first has said is not the second's end.
    assert second.exit_code() is None
    assert len(api.made) == 2


def test_a_run_that_was_asked_to_stop_is_interrupted_and_one_that_others_took_away_is_lost(api, attempt):
    for asked, code in ((True, 75), (False, -signal.SIGTERM)):
        run = opened()
        run.start(attempt)
        if asked:
            run.ask_to_stop()
        else:
            api.objects.clear()
        os.utime(attempt.folder)
        write_json(attempt.run / "status.json", {"exit_code": 75})
        assert run.exit_code() == code


def test_a_run_whose_pods_never_began_is_lost(api, attempt):
    run = opened()
    run.start(attempt)
    end(api, attempt, None, "Failed")
    assert [run.exit_code() for _ in range(2)][-1] == -signal.SIGKILL


def test_an_api_that_is_away_is_named(api, attempt):
    run = opened()
    api.shutdown()
    api.server_close()
    with pytest.raises(EnvironmentFailure, match="^kubernetes: "):
        run.start(attempt)
