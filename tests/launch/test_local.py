"""launch/local.sh as a user runs it: real processes, real signals to the launcher, the program's own exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.golden import ROOT, THREADS

LAUNCHER = ROOT / "launch" / "local.sh"
# A signal comes after the first ones; the others take longer than its answer.
SIGNAL_AFTER, STEPS = 2, 9000


@pytest.fixture
def settings(demo_base, demo_clips, demo_work):
    return [
        f"audio_data_url={demo_clips}",
        f"model={demo_base}",
        f"work_dir={demo_work}",
        f"number_of_steps={STEPS}",
        "rank=4",
        "global_batch_size=2",
        "base_precision=fp32",
        "mixed_precision=no",
        "duration=1",
        "log_every=1",
        # Only a signal or the end saves.
        "save_every=10000",
        "num_workers=0",
        "report=false",
        "gradient_checkpointing=off",
    ]


def start(processes, *words):
    # As many threads as in this process: what it encodes other tests find.
    environment = os.environ | {"SA3DIST_PYTHON": sys.executable, "OMP_NUM_THREADS": str(THREADS)}
    command = [str(LAUNCHER), "-n", str(processes), "--cpu", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows(directory):
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interrupt(launched, directory, sent):
    """Signal the launcher in the middle of training; the step that was saved."""
    while len(rows(directory)) < SIGNAL_AFTER:
        assert launched.poll() is None, launched.communicate()
        time.sleep(0.02)
    launched.send_signal(sent)
    asked = time.monotonic()
    _, err = launched.communicate(timeout=60)
    assert launched.returncode == 75, err
    assert time.monotonic() - asked < 30
    saved = json.loads((directory / "status.json").read_text())["step"]
    assert (directory / "checkpoints" / f"step-{saved:08d}").is_dir()
    return saved


@pytest.mark.slow
def test_a_signal_to_the_launcher_of_two_processes_saves_and_one_process_continues(settings, tmp_path):
    words = [*settings, f"output_dir={tmp_path}/run"]
    saved = interrupt(start(2, *words), tmp_path / "run", signal.SIGUSR1)
    assert SIGNAL_AFTER <= saved < STEPS
    continued = start(1, *words, f"number_of_steps={saved + 2}")
    out, err = continued.communicate(timeout=120)
    assert continued.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["lora_file"]["file_size"] == (tmp_path / "run/lora.safetensors").stat().st_size
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, saved + 3))
    assert [row["resumed_from"] for row in found if "resumed_from" in row] == [saved]


@pytest.mark.slow
def test_a_signal_during_the_first_imports_is_answered(settings, tmp_path):
    launched = start(1, *settings, f"output_dir={tmp_path}/run")
    while not catches(launched.pid, signal.SIGTERM):
        assert launched.poll() is None, launched.communicate()
        time.sleep(0.01)
    launched.send_signal(signal.SIGTERM)
    _, err = launched.communicate(timeout=60)
    assert launched.returncode == 75, err
    assert "SIGTERM while starting" in json.loads((tmp_path / "run/status.json").read_text())["message"]


def catches(pid, number) -> bool:
    """Whether a process has a handler for a signal, as Linux tells."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return bool(int(lines.get("SigCgt", "0"), 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_two_processes_refuse_a_bad_config_with_2(settings, tmp_path):
    launched = start(2, *settings, f"output_dir={tmp_path}/run", "rank=0")
    _, err = launched.communicate(timeout=60)
    assert launched.returncode == 2
    assert "rank: 0 is not valid" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]


@pytest.mark.parametrize("options", [["-n", "0"], ["-n", "two"], ["--gpus", "2"]])
def test_bad_options_of_the_launcher_end_with_2(options):
    done = subprocess.run([str(LAUNCHER), "--cpu", *options, "config.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert options[-1] in done.stderr or options[0] in done.stderr


def test_one_process_per_visible_gpu_by_default(tmp_path):
    # Stand-ins for the driver's tool and for the interpreter: what would be started is printed.
    for name, line in (("nvidia-smi", "echo 0; echo 1; echo 2"), ("interpreter", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SA3DIST_PYTHON": str(tmp_path / "interpreter"),
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    for visible, expected in (({}, 3), ({"CUDA_VISIBLE_DEVICES": "4,6"}, 2)):
        done = subprocess.run([str(LAUNCHER), "a.yaml"], env=environment | visible, capture_output=True, text=True)
        assert f"--nproc-per-node {expected} -m sa3dist.train a.yaml" in done.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rank=32 learning_rate=2e-4", ["rank=32", "learning_rate=2e-4"]),
        (
            """name="take 1" 'audio_data_url=packs/Loops #1'  include=[a,b]""",
            ["name=take 1", "audio_data_url=packs/Loops #1", "include=[a,b]"],
        ),
    ],
)
def test_a_line_of_a_sweep_is_split_as_a_command_line_is(line, words, tmp_path):
    (tmp_path / "sweep.txt").write_text(f"seed=1\n{line}\nname='open\n")
    (tmp_path / "interpreter").write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/got\n")
    (tmp_path / "interpreter").chmod(0o755)
    script = LAUNCHER.parent / "slurm/sweep.sbatch"

    def submit(task):
        environment = os.environ | {"SA3DIST_PYTHON": str(tmp_path / "interpreter"), "SLURM_ARRAY_TASK_ID": task}
        command = ["bash", str(script), "sweep.txt", "run.yaml"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert submit("2").returncode == 0
    got = (tmp_path / "got").read_text().splitlines()
    assert got[got.index("run.yaml") + 1 : -1] == words
    refused = submit("3")
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, "sweep.txt: line 3: quotes do not match")
