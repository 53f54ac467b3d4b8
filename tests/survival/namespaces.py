"""Two hosts as network namespaces: train across them; cut, throttle and delay the link; kill a host. Needs root.

    python tests/survival/namespaces.py DIRECTORY [SCENARIO ...]

Every scenario starts the job on both hosts as launch/slurm/multi_node.sbatch and the Kubernetes manifests do. What ends
well must give the file of a run on one host, bit for bit. What cannot must end on every living host within the bound,
with one line that names rank, host and cause, the same in status.json, exit code 70 and no process left; started again
on the mended network it must continue and give that file too.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from network import Network, require_root
from trial import Trial, local, newest_intact, own_lines, prepare, rows, status, wait_for

STEPS, SAVE_EVERY = 40, 10
STEP_TIMEOUT_SECONDS = 20
# A killed host's peers have this long; a silent link step_timeout, and what ending in order takes.
END_SECONDS = 60.0
CUT_SECONDS = 5.0
LAUNCHERS = {
    "torchrun": "launch/slurm/multi_node.sbatch",
    "static": "launch/kubernetes/jobset.yaml",
    "accelerate": "the README's command on every host",
}


def launch(kind: str, number: int, hosts: int, per_host: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Command line, up to the program's own words, and environment of one host's part."""
    supervise = [sys.executable, "-m", "sa3dist.supervise"]
    program = ["-m", "sa3dist.train"]
    if kind == "accelerate":
        options = ["--multi_gpu", "--num_machines", str(hosts), "--num_processes", str(hosts * per_host)]
        options += ["--rdzv_backend", "c10d", "--main_process_ip", "sa3-0", "--main_process_port", str(port)]
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", *options, "--machine_rank", str(number)]
        return [*supervise, *accelerate, *program], {}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if kind == "static":
        sizes = {"PET_NNODES": hosts, "PET_NPROC_PER_NODE": per_host, "PET_NODE_RANK": number, "PET_MASTER_PORT": port}
        environment = {name: str(value) for name, value in sizes.items()} | {"PET_MASTER_ADDR": "sa3-0"}
        return [*supervise, *torchrun, *program], environment
    options = ["--nnodes", str(hosts), "--nproc-per-node", str(per_host), "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"sa3-0:{port}", "--rdzv-id", str(port)]
    return [*supervise, *torchrun, *options, *program], {}


class Job:
    """The parts of one job on all hosts, started together."""

    ports = iter(range(29600, 29999))

    def __init__(
        self, network: Network, words: dict, output_dir: Path, name: str, kind="torchrun", per_host=1, more=None
    ) -> None:
        """more: further variables of the launcher's environment."""
        self.output_dir = output_dir
        port, self.parts = next(self.ports), []
        for number in range(len(network.nodes)):
            command, environment = launch(kind, number, len(network.nodes), per_host, port)
            environment |= more or {}
            command += [f"{key}={value}" for key, value in (words | {"output_dir": output_dir}).items()]
            log = output_dir.with_name(f"{name}-host{number}.log")
            self.parts.append(Trial(network.on(number, command), output_dir, log, environment))

    def reach(self, step: int) -> None:
        wait_for(
            f"step {step}",
            lambda: len(rows(self.output_dir)) >= step or any(part.ended() for part in self.parts),
        )

    def wait(self, parts: list[int], seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        return [self.parts[number].wait(deadline - time.monotonic()) for number in parts]

    def nothing_left(self) -> bool:
        return not [pid for part in self.parts for pid in part.leftovers()]


class Proof:
    def __init__(self, directory: Path, network: Network) -> None:
        self.directory, self.network = directory, network
        self.words = prepare(directory) | {"number_of_steps": STEPS, "save_every": SAVE_EVERY}
        self.words |= {"step_timeout": STEP_TIMEOUT_SECONDS}
        self._expected: dict[int, str] = {}

    def expected(self, processes: int) -> str:
        """The file of as many processes on one host."""
        if processes not in self._expected:
            output_dir = self.fresh(f"one-host-{processes}")
            trial = Trial(local(self.words | {"output_dir": output_dir}, processes), output_dir, output_dir / "log")
            assert trial.wait() == 0, trial.log.read_text()
            self._expected[processes] = digest(output_dir)
        return self._expected[processes]

    def fresh(self, name: str) -> Path:
        output_dir = self.directory / name
        shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir(parents=True)
        return output_dir

    def job(self, name: str, output_dir: Path, **options) -> Job:
        return Job(self.network, self.words, output_dir, name, **options)

    def is_whole(self, output_dir: Path, processes: int) -> None:
        steps = [row["step"] for row in rows(output_dir)]
        assert steps == list(range(1, STEPS + 1)), f"{output_dir}: logged steps {steps}"
        assert digest(output_dir) == self.expected(processes), f"{output_dir}: another file than on one host"

    def ends_well(self, name: str, during: Callable[[], None] = lambda: None, seconds=600.0, **options) -> dict:
        """A job that must not mind what happens ``during`` its tenth step."""
        processes = 2 * options.get("per_host", 1)
        self.expected(processes)
        output_dir = self.fresh(name)
        job = self.job(name, output_dir, **options)
        job.reach(10)
        began = time.monotonic()
        during()
        codes = job.wait([0, 1], seconds)
        assert codes == [0, 0], f"{name}: exit codes {codes}, {status(output_dir)}"
        assert job.nothing_left()
        self.is_whole(output_dir, processes)
        last = rows(output_dir)[10:]
        return {
            "identical": True,
            "seconds": round(time.monotonic() - began, 1),
            "longest_step": round(max(row["step_seconds"] for row in last), 2),
            "median_step": round(sorted(row["step_seconds"] for row in last)[len(last) // 2], 3),
        }

    def ends_told(self, name: str, harm: Callable[[Job], list[int]], mend: Callable[[], None], seconds: float) -> dict:
        """A job that ``harm`` ends; the hosts it returns have to end by themselves. Then the job is started again."""
        self.expected(2)
        output_dir = self.fresh(name)
        job = self.job(name, output_dir)
        job.reach(SAVE_EVERY + 5)
        began = time.monotonic()
        living = harm(job)
        codes = job.wait(living, seconds)
        ended = time.monotonic() - began
        assert job.nothing_left(), f"{name}: processes left behind"
        told = status(output_dir)
        lines = {f"host {number}": own_lines(job.parts[number].log) for number in living}
        mend()
        saved = newest_intact(output_dir)
        again = self.job(f"{name}-again", output_dir)
        assert again.wait([0, 1], 600) == [0, 0], status(output_dir)
        self.is_whole(output_dir, 2)
        resumed = [row["resumed_from"] for row in rows(output_dir) if "resumed_from" in row]
        assert resumed == [saved]
        assert saved > 0
        return {"exit": codes, "seconds": round(ended, 1), "status": told, "stderr": lines, "resumed_from": saved}

    def cut_short(self) -> None:
        self.network.cut(1)
        time.sleep(CUT_SECONDS)
        self.network.mend(1)

    def cut_for_good(self, job: Job) -> list[int]:
        self.network.cut(1)
        return [0, 1]

    def kill(self, number: int, silently: bool) -> Callable[[Job], list[int]]:
        def harm(job: Job) -> list[int]:
            if silently:
                # As when the power goes: nobody is left to close the connections.
                self.network.cut(number)
            job.parts[number].kill_all()
            return [1 - number]

        return harm


def digest(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "lora.safetensors").read_bytes()).hexdigest()


def scenarios(proof: Proof) -> dict[str, Callable[[], dict]]:
    network = proof.network
    silent = STEP_TIMEOUT_SECONDS + END_SECONDS

    def mend() -> None:
        for number in (0, 1):
            network.mend(number)

    def throttled() -> dict:
        network.throttle(5)
        try:
            return proof.ends_well("throttled")
        finally:
            network.throttle(None)

    def delayed() -> dict:
        network.delay(0.05)
        try:
            return proof.ends_well("delayed")
        finally:
            network.delay(None)

    def cut_short() -> dict:
        found = proof.ends_well("cut-5s", proof.cut_short)
        assert found["longest_step"] >= CUT_SECONDS, f"cut-5s: the cut was not felt: {found}"
        return found

    return {
        **{f"plain-{kind}": lambda kind=kind: proof.ends_well(f"plain-{kind}", kind=kind) for kind in LAUNCHERS},
        "plain-2x2": lambda: proof.ends_well("plain-2x2", per_host=2),
        "throttled": throttled,
        "delayed": delayed,
        "cut-5s": cut_short,
        "cut": lambda: proof.ends_told("cut", proof.cut_for_good, mend, silent),
        "killed-0": lambda: proof.ends_told("killed-0", proof.kill(0, False), mend, END_SECONDS),
        "killed-1": lambda: proof.ends_told("killed-1", proof.kill(1, False), mend, END_SECONDS),
        "power-0": lambda: proof.ends_told("power-0", proof.kill(0, True), mend, silent),
        "power-1": lambda: proof.ends_told("power-1", proof.kill(1, True), mend, silent),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("scenario", nargs="*")
    options = parser.parse_args()
    require_root()
    failed = []
    with Network(2) as network:
        offered = scenarios(Proof(options.directory.resolve(), network))
        for name in options.scenario or offered:
            try:
                print(json.dumps({"scenario": name} | offered[name]()), flush=True)
            except AssertionError as error:
                failed.append(name)
                print(json.dumps({"scenario": name, "failed": str(error)}), flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all as promised")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
