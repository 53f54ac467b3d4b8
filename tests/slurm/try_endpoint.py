"""An endpoint over a real Slurm: the hosted one's client, preemption, several nodes; kills, failures, cancellation.

    tests/slurm/start_cluster.sh DIR && SLURM_CONF=DIR/slurm.conf python tests/slurm/try_endpoint.py WORKDIR

Needs the client that make test-services installs. Takes about five minutes; the first check that fails ends it.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import httpx  # noqa: E402
import safetensors.torch  # noqa: E402

import sa3dist  # noqa: E402
from sa3dist.commands.demo import synthesise_clips  # noqa: E402
from sa3dist.model.tiny import write_tiny_base  # noqa: E402
from sa3dist.serve.job_store import JobStore  # noqa: E402
from tests.helpers import serve  # noqa: E402
from tests.helpers.golden import ROOT  # noqa: E402
from tests.helpers.web_server import WebServer  # noqa: E402

CLIENT = ROOT / ".venv/clients/fal-client-newest"
ON_CPU = ["--gpus-per-node=0", "--cpus-per-task=1", "--ntasks-per-node=1"]


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def wait(what: str, true, seconds: float = 240):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return found


def numbers(job_id: str) -> list[str]:
    """Of all Slurm jobs of a request, ended ones too."""
    return run("squeue", "--noheader", "--states=all", f"--name=sa3dist-{job_id}", "--format=%A").split()


def steps_in(job) -> list[dict]:
    return [json.loads(row) for row in (job.attempt_folder / "run/metrics.jsonl").read_text().splitlines()]


def preempt(number: str, log: Path) -> None:
    """Take the nodes away from a Slurm job, and let it have its turn again."""
    run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", f"--output={log}", "--wrap=true")
    wait("the requeue", lambda: "PENDING" in run("squeue", "--noheader", f"--jobs={number}", "--format=%T"))
    # Slurm lets a requeued job wait two minutes.
    wait("its turn", lambda: run("scontrol", "update", f"JobId={number}", "StartTime=now") == "")


@contextlib.contextmanager
def client_of(folder: Path, base: Path, *words: str):
    """The client from PyPI, led to a started server whose jobs Slurm runs, and the folder of these jobs."""
    sys.path.insert(0, str(CLIENT))
    settings = tuple(f"{name}={value}" for name, value in serve.SETTINGS.items())
    folder.mkdir()
    options = ["--executor=slurm", *(f"--option={word}" for word in ON_CPU), *words]
    server = WebServer(folder, base, *options, settings=settings)
    server.start()
    try:
        sa3dist.fal_env(server.url)
        yield importlib.import_module("fal_client"), server.data / "jobs"
    finally:
        server.stop()


def served(directory: Path, base: Path, clips: Path) -> None:
    """Submitted by the client over HTTP, preempted, requeued, finished, its result fetched; then on two nodes."""
    fields = serve.request(clips, 150)
    with client_of(directory / "one-node", base) as (client, jobs):
        handle = client.submit(serve.APP, fields | {"audio_data_url": client.upload_file(clips)})

        def said() -> str:
            status = handle.status(with_logs=True)
            return " ".join(line["message"] for line in getattr(status, "logs", None) or [])

        wait("the first steps", lambda: re.search(r"train \d+/150", said()))
        (number,) = numbers(handle.request_id)
        preempt(number, directory / "high-1.log")
        result = handle.get()
        rows = [json.loads(row) for row in (jobs / handle.request_id / "cluster/run/metrics.jsonl").open()]
        assert numbers(handle.request_id) == [number]
        assert [row["step"] for row in rows] == list(range(1, 151))
        assert any(row.get("resumed_from") for row in rows)
        lora = safetensors.torch.load(httpx.get(result["lora_file"]["url"]).raise_for_status().content)
        assert len(lora) > 0
        print("ok  by the client: submitted, preempted, requeued, done, and its file loaded", flush=True)
    with client_of(directory / "two-nodes", base, "--nodes=2") as (client, _):
        handle = client.submit(serve.APP, fields | {"audio_data_url": client.encode_file(clips), "number_of_steps": 6})
        config = httpx.get(handle.get()["config_file"]["url"]).raise_for_status().json()
        assert config["world_size"] == 2
        (number,) = numbers(handle.request_id)
        assert run("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%D") == "2"
        print("ok  by the client: on two nodes", flush=True)


def killed(directory: Path, base: Path, clips: Path) -> None:
    """Scheduler and runner killed, a failure, a refusal, a cancellation."""
    store = JobStore(f"sqlite:///{directory / 'jobs.db'}")
    options = {"executor": "slurm", "devices": [0, 1, 2], "options": ON_CPU, "lease_seconds": 6}
    host = serve.Host("submit", store, directory, base, **options)

    def submit(steps: int, **more) -> str:
        settings = serve.SETTINGS | more.pop("settings", {})
        wire = serve.request(clips, steps, **more)
        return store.submit(wire, app=serve.APP, key="k", settings=settings, retries=1).id

    host.start()
    try:
        long, refused = submit(150), submit(5, rank=300)
        wait("the first steps", lambda: store.get(long).step > 5)
        # Killed: the next runner finds the same Slurm job.
        host.scheduler.kill()
        host.scheduler.wait()
        for runner in host.processes("runner"):
            serve.send(runner, signal.SIGKILL)
        host.start()
        wait("another attempt", lambda: store.get(long).attempts == 2 and store.get(long).state == "RUNNING")
        (number,) = numbers(long)
        preempt(number, directory / "high.log")
        done = wait("its end", lambda: (job := store.get(long)).is_finished and job)
        assert done.state == "SUCCEEDED", done
        assert numbers(long) == [number]
        assert [row["step"] for row in steps_in(done)] == list(range(1, 151))
        assert any(row.get("resumed_from") for row in steps_in(done))
        assert (done.folder / done.result["lora_file"]["path"]).stat().st_size > 0
        print(f"ok  killed, found again, preempted and done: one Slurm job, {done.attempts} attempts", flush=True)
        job = wait("the refusal", lambda: (job := store.get(refused)).is_finished and job)
        assert (job.exit_code, job.error["detail"][0]["loc"]) == (2, ["body", "rank"]), job
        print("ok  refused with the field's name", flush=True)
        failed = submit(5, settings={"learning_rate": 1e30})
        job = wait("the failure", lambda: (job := store.get(failed)).is_finished and job)
        assert (job.exit_code, job.attempts, len(numbers(failed))) == (70, 2, 2), job
        print("ok  failed twice, as two Slurm jobs", flush=True)
        cancelled = submit(20000)
        wait("the first steps", lambda: store.get(cancelled).step > 3)
        store.cancel(cancelled)
        job = wait("the cancellation", lambda: (job := store.get(cancelled)).is_finished and job)
        assert (job.state, run("squeue", "--noheader", "--format=%A")) == ("CANCELLED", ""), job
        print("ok  cancelled, and gone from Slurm's queue", flush=True)
    finally:
        host.end_all()
        store.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="made anew")
    directory = parser.parse_args().directory.absolute()
    directory.mkdir(parents=True)
    os.environ |= {"SA3DIST_PROCESSES": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    serve.ENVIRONMENT.update(os.environ)
    base, clips = write_tiny_base(directory / "base"), directory / "clips.zip"
    synthesise_clips(clips, seed=1, count=6)
    try:
        served(directory, base, clips)
        killed(directory, base, clips)
    finally:
        run("scancel", "--me")
    return 0


if __name__ == "__main__":
    sys.exit(main())
