"""sa3dist submit: what reaches each backend, checked by the backend's own models, and what is refused before."""

import os
import shlex
import subprocess
import sys

import pytest
import yaml

from sa3dist import cli, config
from sa3dist.commands import submit

REQUEST = '{"audio_data_url": "/data/clips.zip", "model": "/data/base", "rank": 8}'


@pytest.fixture
def request_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SA3DIST_PYTHON", sys.executable)
    path = tmp_path / "request.json"
    path.write_text(REQUEST)
    return str(path)


def dry_run(capsys, *words) -> str:
    assert cli.main(["submit", "--dry-run", *words]) == 0
    return capsys.readouterr().out


def rendered(capsys, *words) -> list[dict]:
    words = ("--backend", "kubernetes", *words, "name=My Drums!", "output_dir=/data/runs/drums")
    return list(yaml.safe_load_all(dry_run(capsys, *words)))


def program(directory, name, text):
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_local_becomes_the_launcher(request_file, capsys):
    words = shlex.split(dry_run(capsys, "--backend", "local", "--processes", "2", request_file, "rank=4"))
    assert words[0] == f"SA3DIST_PYTHON={sys.executable}"
    assert words[1:] == ["bash", str(submit.launch_file("local.sh")), "-n", "2", request_file, "rank=4"]


def test_local_ends_with_the_runs_own_exit_code(request_file, tmp_path):
    # In the interpreter's place: says what it was asked to run, and ends as an interrupted run does.
    program(tmp_path, "interpreter", 'echo "$@"; exit 75')
    main = "import sys; from sa3dist.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "submit", "--backend", "local", "--processes", "1", request_file]
    environment = os.environ | {"SA3DIST_PYTHON": str(tmp_path / "interpreter")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, f"-m sa3dist.train {request_file}\n")


@pytest.mark.parametrize(("nodes", "script"), [(1, "preemptible.sbatch"), (3, "multi_node.sbatch")])
def test_slurm_gets_the_script_for_the_number_of_nodes(request_file, tmp_path, monkeypatch, capsys, nodes, script):
    program(tmp_path, "sbatch", f'printf "%s\\n" "$@" "$SA3DIST_PYTHON" > {tmp_path}/got; echo 42')
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["--nodes", str(nodes), "--processes", "4", "--option=--partition=gpu", request_file, "name=My Drums!"]
    assert cli.main(["submit", "--backend", "slurm", *words]) == 0
    assert capsys.readouterr().out == "42\n"
    *options, path, request, name, python = (tmp_path / "got").read_text().splitlines()
    asked = ["--parsable", "--job-name=my-drums", f"--nodes={nodes}", "--gpus-per-node=4", "--partition=gpu"]
    assert options == asked
    assert (path, request, name) == (str(submit.launch_file(f"slurm/{script}")), request_file, "name=My Drums!")
    assert python == sys.executable


def test_kubernetes_gets_a_job_with_the_settings_the_request_stands_for(request_file, capsys):
    config_map, job = rendered(capsys, "--processes", "2", "--image", "here/sa3dist:1", "--volume", "big", request_file)
    settings = config.build(yaml.safe_load(config_map["data"]["config.yaml"]))
    assert (settings.rank, settings.model, str(settings.output_dir)) == (8, "/data/base", "/data/runs/drums")
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert job["metadata"]["name"] == "my-drums"
    assert container["image"] == "here/sa3dist:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "--nproc-per-node=2" in container["command"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "big"
    assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    assert container["livenessProbe"]["exec"]["command"][2:] == ["/data/runs/drums"]


def test_kubernetes_gets_a_job_set_for_several_nodes(request_file, capsys):
    _, job_set = rendered(capsys, "--nodes", "3", "--processes", "4", request_file)
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (3, 3)
    variables = {item["name"]: item.get("value") for item in job["template"]["spec"]["containers"][0]["env"]}
    assert (variables["PET_NNODES"], variables["PET_NPROC_PER_NODE"]) == ("3", "4")
    assert variables["PET_MASTER_ADDR"] == "my-drums-node-0-0.my-drums"


def test_kubectl_reads_what_a_dry_run_prints(request_file, tmp_path, monkeypatch, capsys):
    words = ["--backend", "kubernetes", "--option=--namespace=audio", request_file, "output_dir=/data/run"]
    printed = dry_run(capsys, *words)
    program(tmp_path, "kubectl", f'echo "$@"; while read -r line; do echo "$line"; done > {tmp_path}/got')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["submit", *words]) == 0
    assert capsys.readouterr().out == "apply --namespace=audio --filename=-\n"
    got = [line.strip() for line in (tmp_path / "got").read_text().splitlines()]
    assert got == [line.strip() for line in printed.splitlines()]


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (["--backend", "slurm", "rank=0"], 2, "rank: 0 is not valid"),
        (["--backend", "local", "--nodes", "2"], 2, "--nodes 2 needs --backend slurm or kubernetes"),
        (["--backend", "kubernetes"], 2, "output_dir: runs/sa3dist-lora is relative"),
        *(
            (["--backend", "kubernetes", "output_dir=/data/run", word], 2, f"{word.replace('=', ': ')} is relative")
            for word in ("audio_data_url=clips.zip", "model=demo/base", "lora_checkpoint_url=a.safetensors")
        ),
        (["--backend", "kubernetes", "output_dir=/data/run", "model=~/base"], 2, "model: ~/base is a home of this"),
        (["--backend", "slurm"], 70, "sbatch is not installed here"),
        (["--backend", "kubernetes", "output_dir=/data/run"], 70, "kubectl refused (3): no such cluster"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(request_file, tmp_path, monkeypatch, capsys, words, code, match):
    program(tmp_path, "kubectl", "echo no such >&2; echo cluster >&2; exit 3")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["submit", request_file, *words]) == code
    said = capsys.readouterr().err
    assert match in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "expected"), [("a b", "a-b"), ("9 lives", "run-9-lives"), ("ü", "run"), ("x" * 80, "x" * 40)]
)
def test_names_become_dns_labels(name, expected):
    assert submit.label(name) == expected
