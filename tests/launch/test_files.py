"""What launch/ and docker/ ship passes the linters and the schemas of what it is for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import kubernetes_api
from tests.helpers.golden import ROOT

TOOLS = Path(sys.executable).parent
MANIFESTS = sorted((ROOT / "launch/kubernetes").glob("*.yaml"))
SCRIPTS = [*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch/slurm").glob("*.sbatch"), *ROOT.glob("tests/slurm/*.sh")]


def tool(name: str) -> str:
    path = TOOLS / name
    if not path.exists():
        pytest.skip(f"{name} is not installed; it comes with the dev extra")
    return str(path)


def documents() -> list[dict]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> dict:
    return next(document for document in documents() if document["kind"] == kind)


def pods() -> list[dict]:
    job, runtime = of_kind("Job")["spec"], of_kind("TrainingRuntime")["spec"]["template"]["spec"]
    sets = [jobs["replicatedJobs"][0]["template"]["spec"] for jobs in (of_kind("JobSet")["spec"], runtime)]
    return [template["template"]["spec"] for template in (job, *sets)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_hadolint():
    done = subprocess.run([tool("hadolint"), str(ROOT / "docker/Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_yaml_passes_yamllint():
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
    command = [tool("yamllint"), "-d", rules, "launch", "docker", "configs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("document", documents(), ids=lambda document: document["kind"])
def test_manifests_are_what_the_api_defines_and_nothing_else(document):
    # The models drop keys they do not know.
    assert kubernetes_api.lost(document) == []


@pytest.mark.parametrize("pod", pods(), ids=["Job", "JobSet", "TrainingRuntime"])
def test_pods_run_as_an_ordinary_user_and_may_save_before_they_are_killed(pod):
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    # torchrun itself waits 30 s.
    assert pod["terminationGracePeriodSeconds"] > 30
    assert container["command"][:3] == ["python", "-m", "sa3dist.supervise"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("pod", pods(), ids=["Job", "JobSet", "TrainingRuntime"])
def test_pods_take_the_hubs_token_from_a_secret_that_may_be_missing(pod):
    (token,) = [variable for variable in pod["containers"][0]["env"] if variable["name"] == "HF_TOKEN"]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "huggingface", "key": "token", "optional": True}}
    # As the launching page says how to make it.
    assert "kubectl create secret generic huggingface --from-literal=token=" in (ROOT / "launch/README.md").read_text()


def test_containers_of_compose_get_the_hubs_token_of_the_shell():
    train, serve = (
        yaml.safe_load((ROOT / f"docker/{name}").read_text()) for name in ("compose.yaml", "compose.serve.yaml")
    )
    assert "HF_TOKEN" in train["services"]["train"]["environment"]
    # Without a value: that of the shell, and none if it has none.
    assert serve["services"]["serve"]["environment"]["HF_TOKEN"] is None


def test_health_is_watched_where_the_run_writes():
    settings = yaml.safe_load(of_kind("ConfigMap")["data"]["config.yaml"])
    for pod in pods():
        command = pod["containers"][0]["livenessProbe"]["exec"]["command"]
        assert command == ["sa3dist-alive", "60", settings["output_dir"]]


def test_the_endpoint_may_do_what_it_asks_of_the_cluster_and_no_more():
    (rule,) = of_kind("Role")["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["jobset.x-k8s.io"], ["jobsets"])
    # What the executor calls; see kubernetes_executor.py.
    assert sorted(rule["verbs"]) == ["create", "delete", "get"]
    pod = of_kind("StatefulSet")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == of_kind("RoleBinding")["subjects"][0]["name"]
    assert of_kind("RoleBinding")["roleRef"]["name"] == of_kind("Role")["metadata"]["name"]


def test_the_training_job_finds_its_runtime():
    assert of_kind("TrainJob")["spec"]["runtimeRef"]["name"] == of_kind("TrainingRuntime")["metadata"]["name"]


@pytest.mark.parametrize("given", [".", "run"])
@pytest.mark.parametrize(("age_minutes", "code"), [(0, 0), (59, 0), (61, 1)])
def test_alive_means_a_heartbeat_within_the_given_minutes(tmp_path, given, age_minutes, code):
    heartbeat, other = tmp_path / "run/heartbeat.json", tmp_path / "run/metrics.jsonl"
    heartbeat.parent.mkdir()
    other.touch()
    heartbeat.touch()
    written = time.time() - 60 * age_minutes
    os.utime(heartbeat, (written, written))
    command = [str(ROOT / "launch/alive.sh"), "60", str(tmp_path / "not-yet"), str(tmp_path / given)]
    assert subprocess.run(command).returncode == code


@pytest.mark.parametrize("script", sorted((ROOT / "launch/slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_batch_scripts_are_warned_before_the_time_limit_and_replaced_by_what_slurm_signals(script):
    text = script.read_text()
    assert "#SBATCH --signal=B:USR1@120" in text
    # The batch shell must be gone: Slurm signals its process id.
    assert 'exec "$python" -m sa3dist.supervise' in text
