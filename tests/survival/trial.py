"""One trial: the shipped launcher on a tiny base, watched from outside through its files and its processes."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

# Before torch is imported here: OpenMP's threads do not live through the fork, and a rank would wait for them for good.
# The second is what the program asks for itself where it is started anew.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "local.sh"
# Found again in /proc: a process of a trial stays one whoever its parent is.
MARK = "SA3DIST_TRIAL"
SETTINGS: dict[str, str | int] = {
    "rank": 4,
    "base_precision": "fp32",
    "mixed_precision": "no",
    "pre_encode": "true",
    "num_workers": 0,
    "duration": 1,
    "log_every": 1,
    "deterministic": "true",
    # A page after every save is a process each time; how such a process ends: tests/report/test_background.py.
    "report": "false",
    # Counting what a step keeps takes a second of every start.
    "gradient_checkpointing": "off",
}


def prepare(directory: Path, clips: int = 8) -> dict[str, str | int]:
    """Make a tiny base and clips below ``directory``, once; the settings of a run on them."""
    from sa3dist.commands.demo import synthesise_clips
    from sa3dist.model.tiny import write_tiny_base

    directory.mkdir(parents=True, exist_ok=True)
    archive, base = directory / f"clips-{clips}.zip", directory / "base"
    if not archive.exists():
        synthesise_clips(archive, seed=1, count=clips)
    if not (base / "model.safetensors").exists():
        write_tiny_base(base)
    return SETTINGS | {"audio_data_url": str(archive), "model": str(base), "work_dir": str(directory / "work")}


def wait_for(what: str, true: Callable[[], bool], seconds: float = 600, poll: float = 0.002) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(poll)


class Trial:
    """One start of a launcher, in an environment that marks all processes that come of it."""

    def __init__(self, command: list[str], output_dir: Path, log: Path, environment: dict[str, str] | None = None):
        self.output_dir = output_dir
        self.log = log
        self.mark = uuid.uuid4().hex
        log.parent.mkdir(parents=True, exist_ok=True)
        settings = {"SA3DIST_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        settings |= {MARK: self.mark} | (environment or {})
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=os.environ | settings, stdout=out, stderr=out, start_new_session=True
            )

        end_with_this_process(self.kill_all)

    def processes(self) -> dict[int, dict[str, str]]:
        """Environment by pid of all that lives of this trial."""
        return marked(self.mark)

    def ranks(self) -> dict[int, int]:
        """Pid by rank: a process with a rank whose parent has none (loader workers inherit theirs)."""
        living = self.processes()
        return {
            int(environment["RANK"]): pid
            for pid, environment in living.items()
            if "RANK" in environment and "RANK" not in living.get(parent_of(pid), {})
        }

    def kill_all(self) -> None:
        """What a power cut does."""
        for pid in self.processes():
            send(pid, signal.SIGKILL)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, seconds: float = 600) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running after {seconds:.0f} s; {self.log}: {tail(self.log)}") from None

    def said(self) -> str:
        return said(self.log)

    def leftovers(self, seconds: float = 3.0) -> list[int]:
        """What still lives of the trial a while after its launcher has ended; it is killed."""
        deadline = time.monotonic() + seconds
        while (living := list(self.processes())) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill_all()
        return living


class ForkedTrial:
    """Ranks forked from this process, which has imported the program: a start then costs no imports.

    The caller stands in for the launch agent. With ``as_agent`` peers of a rank that ends are sent SIGTERM, as torchrun
    does; without, they are left to find out, as under srun.
    """

    def __init__(
        self, words: dict, processes: int, output_dir: Path, log: Path, as_agent: bool, zero: Path | None = None
    ) -> None:
        """zero: a configuration of DeepSpeed, which is asked for as Accelerate's launcher does."""
        # What a run imports on its way, before the first fork.
        import accelerate  # noqa: F401
        import torch._dynamo  # noqa: F401
        import transformers  # noqa: F401

        from sa3dist import pipeline  # noqa

        if zero:
            _import_deepspeed()

        self.output_dir, self.log, self.as_agent = output_dir, log, as_agent
        self.codes: dict[int, int] = {}
        self._told = False
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        asked = zero_environment(zero) if zero else {}
        self.pids = {rank: self._fork(rank, processes, port, words, asked) for rank in range(processes)}
        end_with_this_process(self.kill_all)

    def _fork(self, rank: int, processes: int, port: int, words: dict, asked: dict[str, str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **asked}
            if processes > 1 or asked:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in places.items()}
            from sa3dist import train

            self.in_rank(rank)
            code = train.main([f"{key}={value}" for key, value in words.items()])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def in_rank(self, rank: int) -> None:
        """Called in the process of a rank before it begins."""

    def ended(self) -> bool:
        """Whether all ranks have; does the agent's work on the way."""
        for rank, pid in self.ranks().items():
            done, result = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[rank] = os.waitstatus_to_exitcode(result)
        if self.as_agent and any(self.codes.values()) and not self._told:
            self._told = True
            for pid in self.ranks().values():
                send(pid, signal.SIGTERM)
        return len(self.codes) == len(self.pids)

    def ranks(self) -> dict[int, int]:
        return {rank: pid for rank, pid in self.pids.items() if rank not in self.codes}

    def kill_all(self) -> None:
        for pid in self.ranks().values():
            send(pid, signal.SIGKILL)

    def wait(self, seconds: float = 600) -> int:
        """Exit code of the ranks: the one status.json would be read for, so that of a rank that was not killed."""
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                self.kill_all()
                raise AssertionError(f"still running after {seconds:.0f} s; {self.log}: {tail(self.log)}")
            time.sleep(0.01)
        return max(self.codes.values())

    def said(self) -> str:
        return said(self.log)

    def leftovers(self) -> list[int]:
        """Processes whose group one of the ranks led: loader workers, mostly."""
        return [pid for pid in session_members(set(self.pids.values())) if pid not in self.pids.values()]


def zero_environment(file: Path) -> dict[str, str]:
    """What Accelerate's launcher sets where it is asked for DeepSpeed."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


def _import_deepspeed() -> None:
    """Once for all ranks: each would take seconds for it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Else each rank would try to build its collectives of shared memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def end_with_this_process(kill: Callable[[], None]) -> None:
    """Leave nothing running, also when this program is interrupted."""
    atexit.register(kill)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def session_members(leaders: set[int]) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
        except OSError:
            continue
        if session in leaders:
            found.append(int(entry.name))
    return found


def local(words: dict, processes: int) -> list[str]:
    """Command line of launch/local.sh."""
    return [str(LAUNCHER), "-n", str(processes), "--cpu", *(f"{key}={value}" for key, value in words.items())]


def marked(mark: str) -> dict[int, dict[str, str]]:
    """Environment by pid of all processes that carry the mark, zombies excepted: theirs reads empty."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        environment = dict(pair.partition("=")[::2] for pair in pairs)
        if environment.get(MARK) == mark:
            found[int(entry.name)] = environment
    return found


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def send(pid: int, number: int) -> bool:
    """Whether the process was there to be signalled."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def rows(output_dir: Path) -> list[dict]:
    """The whole rows of steps in metrics.jsonl; those of evaluations are left out."""
    path = output_dir / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            found.append(json.loads(line))
    return [row for row in found if "loss" in row]


def status(output_dir: Path) -> dict:
    path = output_dir / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def newest_intact(output_dir: Path) -> int:
    """Step of the checkpoint a restart has to continue from; 0 = none."""
    from sa3dist.training import checkpoint

    found = checkpoint.find(output_dir, "auto")
    return 0 if found is None else found.step


def unfinished(output_dir: Path) -> set[str]:
    """Names of checkpoints that are being written, or were when their writer was killed."""
    return {path.name for path in (output_dir / "checkpoints").glob(".*")}


def said(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def tail(log: Path, lines: int = 12) -> str:
    return "\n".join(said(log).splitlines()[-lines:])


def own_lines(log: Path) -> list[str]:
    """Lines of the log that are neither progress, nor news of ours, nor the launch agent's or a library's."""
    known = ("sa3dist:", "train ", "encode ", "check clips", "supervise:", '{"lora_file"', "W1", "E1", "I1", "[")
    kept = []
    for line in said(log).splitlines():
        # torchrun ends with a traceback of its own and a framed summary.
        if line.startswith(("Traceback", "=====")):
            break
        if line.strip() and not line.startswith(known):
            kept.append(line)
    return kept


def percentile(values: list[float], share: float) -> float:
    """Smallest value that at least ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]
