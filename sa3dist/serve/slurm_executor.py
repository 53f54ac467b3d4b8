"""The trainer as a Slurm job: submitted once under a name made of the request's id, watched, cancelled.

Slurm runs it, requeues it and outlives its shepherd. A second submit, after a crash, finds the first by that name;
should two be on their way at once, Slurm holds the later one back until the earlier has ended (singleton).
"""

import os
import re
import shutil
import signal
import subprocess
import sys

from sa3dist.errors import ConfigError, EnvironmentFailure
from sa3dist.runtime.launch_files import launch_file
from sa3dist.serve.cluster import ANSWER_SECONDS, Submitted
from sa3dist.serve.executor import Attempt
from sa3dist.serve.options import RunOptions
from sa3dist.serve.processes import MARK


class Slurm:
    """Submits launch/slurm/preemptible.sbatch, or multi_node.sbatch where a job has several nodes."""

    outlives_shepherd = True

    def __init__(self, options: RunOptions) -> None:
        if shutil.which("sbatch") is None:
            raise ConfigError("executor: slurm needs sbatch, squeue and scancel; they are not installed here")
        self._options = options
        self._asked_to_stop = False
        self._name = ""

    def start(self, attempt: Attempt) -> None:
        self._name = f"sa3dist-{attempt.job.id}"
        self._run = Submitted(attempt)
        # One of this name is on its way, or has ended since its shepherd was lost; or there is to be none.
        if self._is_queued() or self._run.has_ended() or attempt.job.cancel:
            return
        self._run.note()
        asked = [f"--job-name={self._name}", "--dependency=singleton", f"--output={attempt.log}"]
        asked += [f"--nodes={attempt.nodes}", f"--gpus-per-node={attempt.processes}"]
        script = str(launch_file("slurm/multi_node.sbatch" if attempt.nodes > 1 else "slurm/preemptible.sbatch"))
        number = ask("sbatch", "--parsable", *asked, *self._options.options, script, str(attempt.request))
        self._run.note(number=number.partition(";")[0])

    def exit_code(self) -> int | None:
        return self._run.exit_code(self._is_queued, self._asked_to_stop, self._code_by_slurm)

    def ask_to_stop(self) -> None:
        self._asked_to_stop = True
        # SIGTERM, and SIGKILL after the cluster's KillWait; it is not queued again.
        ask("scancel", "--me", f"--name={self._name}")

    def kill(self) -> bool:
        self.ask_to_stop()
        return not self._is_queued()

    def _is_queued(self) -> bool:
        return bool(ask("squeue", "--noheader", "--me", f"--name={self._name}", "--format=%A"))

    def _code_by_slurm(self) -> int:
        number = self._run.noted("number")
        # The first where there is accounting; the second knows a job for some minutes.
        asked = (["sacct", "-X", "-n", "-P", "-o", "ExitCode", "-j", number], ["scontrol", "-o", "show", "job", number])
        for words in asked if number else ():
            found = re.search(r"(?:^|ExitCode=)(\d+):(\d+)", _run(words).stdout)
            if found:
                # Ended well, and has not said so: not this run's end.
                return -int(found[2]) or int(found[1]) or -signal.SIGKILL
        return -signal.SIGKILL


def ask(*words: str) -> str:
    """What a program of Slurm answers. Raises EnvironmentFailure."""
    done = _run(list(words))
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise EnvironmentFailure(f"{words[0]} refused ({done.returncode}): {said}")
    return done.stdout.strip()


def _run(words: list[str]) -> subprocess.CompletedProcess:
    # The job is no process of this host's attempt, wherever Slurm starts it.
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    environment.setdefault("SA3DIST_PYTHON", sys.executable)
    if shutil.which(words[0]) is None:
        raise EnvironmentFailure(f"{words[0]} is not installed here")
    try:
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailure(f"{words[0]} has not answered in {ANSWER_SECONDS} s") from error
