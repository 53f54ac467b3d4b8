"""Runs the trainer as a Slurm job, under a name made from the request's id.

Slurm runs and requeues the job, which outlives its runner. After a crash the next runner finds the job by its name. If
two are submitted at once, Slurm holds the second until the first has ended (singleton).
"""

import os
import re
import shutil
import signal
import subprocess
import sys

from sa3dist.errors import ConfigError, EnvironmentFailure
from sa3dist.runtime.launch_files import launch_file
from sa3dist.serve.cluster import ANSWER_SECONDS, ClusterRun
from sa3dist.serve.executor import Attempt
from sa3dist.serve.options import RunOptions
from sa3dist.serve.processes import MARK


class Slurm:
    """Submits launch/slurm/preemptible.sbatch, or multi_node.sbatch if a job has several nodes."""

    outlives_runner = True

    def __init__(self, options: RunOptions) -> None:
        if shutil.which("sbatch") is None:
            raise ConfigError("executor: slurm needs sbatch, squeue and scancel; they are not installed here")
        self._options = options
        self._asked_to_stop = False
        self._name = ""

    def start(self, attempt: Attempt) -> None:
        self._name = f"sa3dist-{attempt.job.id}"
        self._run = ClusterRun(attempt)
        # Do not submit if one of this name is queued or running, or has ended, or the job was cancelled.
        if self._is_queued() or self._run.has_ended() or attempt.job.cancel:
            return
        self._run.note()
        options = [f"--job-name={self._name}", "--dependency=singleton", f"--output={attempt.log}"]
        options += [f"--nodes={attempt.nodes}", f"--gpus-per-node={attempt.processes}", *self._options.options]
        script = str(launch_file("slurm/multi_node.sbatch" if attempt.nodes > 1 else "slurm/preemptible.sbatch"))
        number = ask("sbatch", "--parsable", *options, script, str(attempt.request))
        self._run.note(number=number.partition(";")[0])

    def exit_code(self) -> int | None:
        return self._run.exit_code(self._is_queued, self._asked_to_stop, self._code_by_slurm)

    def ask_to_stop(self) -> None:
        self._asked_to_stop = True
        # Slurm sends SIGTERM, then SIGKILL after the cluster's KillWait; it does not requeue the job.
        ask("scancel", "--me", f"--name={self._name}")

    def kill(self) -> bool:
        self.ask_to_stop()
        return not self._is_queued()

    def _is_queued(self) -> bool:
        return bool(ask("squeue", "--noheader", "--me", f"--name={self._name}", "--format=%A"))

    def _code_by_slurm(self) -> int:
        number = self._run.noted("number")
        # sacct needs accounting; scontrol knows a finished job only for some minutes.
        queries = (
            ["sacct", "-X", "-n", "-P", "-o", "ExitCode", "-j", number],
            ["scontrol", "-o", "show", "job", number],
        )
        for command in queries if number else ():
            match = re.search(r"(?:^|ExitCode=)(\d+):(\d+)", _run(command).stdout)
            if match:
                # Exit code 0 without a status cannot be the end of this run: count it as killed.
                return -int(match[2]) or int(match[1]) or -signal.SIGKILL
        return -signal.SIGKILL


def ask(*words: str) -> str:
    """Run a Slurm command; returns its output. Raises EnvironmentFailure."""
    done = _run(list(words))
    if done.returncode != 0:
        message = " ".join((done.stderr or done.stdout).split())
        raise EnvironmentFailure(f"{words[0]} refused ({done.returncode}): {message}")
    return done.stdout.strip()


def _run(words: list[str]) -> subprocess.CompletedProcess:
    # Without the mark: a Slurm job must not be taken for a local process of the attempt, even on this host.
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    environment.setdefault("SA3DIST_PYTHON", sys.executable)
    if shutil.which(words[0]) is None:
        raise EnvironmentFailure(f"{words[0]} is not installed here")
    try:
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailure(f"{words[0]} has not answered in {ANSWER_SECONDS} s") from error
