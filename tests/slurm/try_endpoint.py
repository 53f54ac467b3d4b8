"""Jobs of an endpoint's queue under a real Slurm: preempted, shepherd and scheduler killed, cancelled, refused.

    tests/slurm/start_cluster.sh DIR && SLURM_CONF=DIR/slurm.conf python tests/slurm/try_endpoint.py WORKDIR

Takes about two minutes; the first check that fails ends the program.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from sa3dist.commands.demo import synthesise_clips  # noqa: E402
from sa3dist.model.tiny import write_tiny_base  # noqa: E402
from sa3dist.serve.jobs import JobStore  # noqa: E402
from tests.helpers import serve  # noqa: E402

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="made anew")
    directory = parser.parse_args().directory.absolute()
    directory.mkdir(parents=True)
    os.environ |= {"SA3DIST_PROCESSES": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    serve.ENVIRONMENT.update(os.environ)
    base, clips = write_tiny_base(directory / "base"), directory / "clips.zip"
    synthesise_clips(clips, seed=1, count=6)
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
        # Killed: the next shepherd finds the same Slurm job.
        host.scheduler.kill()
        host.scheduler.wait()
        for shepherd in host.processes("shepherd"):
            serve.send(shepherd, signal.SIGKILL)
        host.start()
        wait("another attempt", lambda: store.get(long).attempts == 2 and store.get(long).state == "RUNNING")
        (number,) = numbers(long)
        whole_cluster = ("--partition=high", "--nodes=2", "--exclusive")
        run("sbatch", "--parsable", *whole_cluster, f"--output={directory}/high.log", "--wrap=true")
        wait("the requeue", lambda: "PENDING" in run("squeue", "--noheader", f"--jobs={number}", "--format=%T"))
        # Slurm lets a requeued job wait two minutes.
        wait("its turn", lambda: run("scontrol", "update", f"JobId={number}", "StartTime=now") == "")
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
        run("scancel", "--me")
        host.end_all()
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
