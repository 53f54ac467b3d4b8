"""Run every batch script under a real Slurm: ends, preemption, time limit, cancellation, several nodes, a sweep.

    tests/slurm/start_cluster.sh DIR && SLURM_CONF=DIR/slurm.conf python tests/slurm/try_scripts.py WORKDIR

Takes about four minutes; every check prints one line, the first that fails ends the program. `--only ends` runs one.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "launch" / "slurm"
# The scripts ask for GPUs; this machine has cores.
ON_CPU = ["--gpus-per-node=0", "--cpus-per-task=2", "--ntasks-per-node=1"]
CONFIG = {
    "audio_data_url": "clips.zip",
    "model": "base",
    "rank": 4,
    "base_precision": "fp32",
    "mixed_precision": "no",
    "pre_encode": True,
    "num_workers": 0,
    "duration": 1,
    "log_every": 1,
    "number_of_steps": 8,
    # Never of its own accord: what is saved, a signal saved.
    "save_every": 10000,
}


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def submit(script: str, *words: str, options: tuple[str, ...] = ()) -> str:
    return run("sbatch", "--parsable", *ON_CPU, *options, str(SCRIPTS / script), *words)


def job(number: str) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in run("scontrol", "show", "job", number).split() if "=" in word)


def wait_for(what: str, true, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def ended(number: str) -> str:
    """Wait for the job's end; its state."""
    wait_for(f"job {number} to end", lambda: job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
    return job(number)["JobState"]


def rows(directory: str) -> list[dict]:
    path = Path(directory, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status(directory: str) -> dict:
    return json.loads(Path(directory, "status.json").read_text())


def start_again(number: str) -> None:
    # Slurm lets a requeued job wait two minutes.
    wait_for(f"job {number} to be pending", lambda: job(number)["JobState"] == "PENDING")
    run("scontrol", "update", f"JobId={number}", "StartTime=now")


def continued(directory: str, steps: int) -> int:
    """Check that every step is there once and that the second start went on where the first was saved."""
    found = rows(directory)
    assert [row["step"] for row in found] == list(range(1, steps + 1)), found
    resumed = [row["resumed_from"] for row in found if "resumed_from" in row]
    assert len(resumed) == 1, resumed
    assert resumed[0] > 0
    assert status(directory)["exit_code"] == 0
    return resumed[0]


def prepare() -> None:
    from sa3dist.commands.demo import synthesise_clips
    from sa3dist.model.tiny import write_tiny_base

    synthesise_clips(Path("clips.zip"), count=6)
    write_tiny_base(Path("base"))
    Path("config.json").write_text(json.dumps(CONFIG))
    os.environ.setdefault("SA3DIST_PYTHON", sys.executable)
    os.environ |= {"SA3DIST_PROCESSES": "2", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def check_ends() -> str:
    number = submit("single_node.sbatch", "config.json", "output_dir=done")
    assert ended(number) == "COMPLETED"
    refused = submit("single_node.sbatch", "config.json", "output_dir=refused", "rank=0")
    assert (ended(refused), job(refused)["ExitCode"]) == ("FAILED", "2:0"), job(refused)
    return "single node: done is COMPLETED, a bad config ends with ExitCode 2"


def check_preemption() -> str:
    steps = 120
    number = submit("preemptible.sbatch", "config.json", "output_dir=preempted", f"number_of_steps={steps}")
    wait_for("20 steps", lambda: len(rows("preempted")) >= 20)
    asked = time.monotonic()
    whole_cluster = ("--partition=high", "--nodes=2", "--exclusive")
    intruder = run("sbatch", "--parsable", *whole_cluster, "--output=high.log", "--wrap=true")
    assert ended(intruder) == "COMPLETED"
    seconds = time.monotonic() - asked
    assert status("preempted")["exit_code"] == 75
    start_again(number)
    assert (ended(number), job(number)["Restarts"]) == ("COMPLETED", "1")
    return f"preempted: the other job was done {seconds:.0f} s later, resumed from {continued('preempted', steps)}"


def check_time_limit() -> str:
    # The shortest limit Slurm has, and its signal once the job has trained a little.
    options = ("--time=2", "--signal=B:USR1@80")
    number = submit("preemptible.sbatch", "config.json", "output_dir=limited", "number_of_steps=20000", options=options)
    wait_for("the status", lambda: Path("limited", "status.json").exists())
    assert status("limited")["exit_code"] == 75
    wait_for("the job to be queued again", lambda: job(number)["JobState"] == "PENDING")
    assert job(number)["Restarts"] == "1"
    run("scancel", number)
    return f"time limit: saved at the signal after step {status('limited')['step']}, queued again"


def check_cancellation() -> str:
    number = submit("preemptible.sbatch", "config.json", "output_dir=cancelled", "number_of_steps=20000")
    wait_for("5 steps", lambda: len(rows("cancelled")) >= 5)
    run("scancel", number)
    assert ended(number) == "CANCELLED"
    wait_for("the status", lambda: Path("cancelled", "status.json").exists(), 40)
    assert status("cancelled")["exit_code"] == 75
    return f"cancelled: saved at step {status('cancelled')['step']} and not queued again"


def check_multi_node() -> str:
    steps, options = 120, ("--nodes=2", "--export=ALL,SA3DIST_PROCESSES=1")
    words = ("config.json", "output_dir=nodes", f"number_of_steps={steps}")
    number = submit("multi_node.sbatch", *words, options=options)
    wait_for("20 steps", lambda: len(rows("nodes")) >= 20)
    run("scancel", "--batch", "--signal=USR1", number)
    start_again(number)
    assert (ended(number), job(number)["Restarts"]) == ("COMPLETED", "1")
    assert json.loads(Path("nodes/config.json").read_text())["world_size"] == 2
    return f"two nodes: signalled, queued again, resumed from {continued('nodes', steps)}"


def check_sweep() -> str:
    Path("ranks.txt").write_text("rank=2\nrank=3 learning_rate=2e-4\n")
    number = submit("sweep.sbatch", "ranks.txt", "config.json", options=("--array=1-2", "--cpus-per-task=1"))
    for task, rank in ((1, 2), (2, 3)):
        assert ended(f"{number}_{task}") == "COMPLETED"
        assert json.loads(Path(f"runs/ranks/{task}/config.json").read_text())["settings"]["rank"] == rank
    return "sweep: two tasks, two ranks, one work directory"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="made anew")
    checks = [check_ends, check_preemption, check_time_limit, check_cancellation, check_multi_node, check_sweep]
    named = {check.__name__.removeprefix("check_"): check for check in checks}
    parser.add_argument("--only", choices=named, action="append", help="default: all")
    options = parser.parse_args()
    directory = options.directory
    directory.mkdir(parents=True)
    os.chdir(directory)
    prepare()
    for name in options.only or named:
        began = time.monotonic()
        said = named[name]()
        print(f"ok  {said}  ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
