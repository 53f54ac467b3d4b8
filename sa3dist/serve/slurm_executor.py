"""The trainer as a Slurm job: submitted once under a name made of the request's id, watched, cancelled.

Slurm runs it, requeues it and outlives its shepherd. A second submit, after a crash, finds the first by that name;
should two be on their way at once, Slurm holds the later one back until the earlier has ended (singleton).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

from sa3dist.errors import EXIT_INTERRUPTED, EnvironmentFailure
from sa3dist.formats import STATUS_NAME, write_json
from sa3dist.runtime.launch_files import launch_file
from sa3dist.serve.attempts import read_json
from sa3dist.serve.executor import Attempt
from sa3dist.serve.options import Options
from sa3dist.serve.processes import MARK
from sa3dist.supervise import identity_of

# How often the controller is asked, which it answers for everybody.
POLL_SECONDS = 3.0
ANSWER_SECONDS = 60.0
# A status written on a node may take a moment to be seen here.
STATUS_SECONDS = 10.0
SUBMITTED_NAME = "submitted.json"


class Slurm:
    """Submits launch/slurm/preemptible.sbatch. The jobs' folder has to be the same on all nodes."""

    outlives_shepherd = True

    def __init__(self, options: Options) -> None:
        self._options = options
        self._asked_to_stop = False
        self._name = ""
        self._asked_at = self._left_at = 0.0

    def start(self, attempt: Attempt) -> None:
        self._name = f"sa3dist-{attempt.job.id}"
        self._attempt = attempt
        self._note = attempt.folder / SUBMITTED_NAME
        self._status = attempt.run / STATUS_NAME
        noted = read_json(self._note)
        # One of this name is on its way, or has ended since its shepherd was lost; or there is to be none.
        if self._is_queued() or attempt.job.cancel or (noted and self._is_new_status(noted)):
            return
        before = identity_of(self._status)
        gpus = [f"--gpus-per-node={attempt.processes}"]
        asked = [f"--job-name={self._name}", "--dependency=singleton", "--nodes=1", f"--output={attempt.log}", *gpus]
        script = str(launch_file("slurm/preemptible.sbatch"))
        number = ask("sbatch", "--parsable", *asked, *self._options.options, script, str(attempt.request))
        write_json(self._note, {"number": number.split(";")[0], "status_before": before})

    def exit_code(self) -> int | None:
        if time.monotonic() - self._asked_at < POLL_SECONDS:
            return None
        self._asked_at = time.monotonic()
        if self._is_queued():
            self._left_at = 0.0
            return None
        noted = read_json(self._note)
        if self._is_new_status(noted):
            code = int(read_json(self._status).get("exit_code", -signal.SIGKILL))
            # Queued again by its own script unless somebody has cancelled it; that counts as a lost attempt.
            return -signal.SIGTERM if code == EXIT_INTERRUPTED and not self._asked_to_stop else code
        self._left_at = self._left_at or time.monotonic()
        if self._attempt.job.cancel or time.monotonic() - self._left_at > STATUS_SECONDS:
            return self._code_by_slurm(noted)
        return None

    def ask_to_stop(self) -> None:
        self._asked_to_stop = True
        # SIGTERM, and SIGKILL after the cluster's KillWait; it is not queued again.
        ask("scancel", "--me", f"--name={self._name}")

    def kill(self) -> bool:
        self.ask_to_stop()
        return not self._is_queued()

    def _is_queued(self) -> bool:
        return bool(ask("squeue", "--noheader", "--me", f"--name={self._name}", "--format=%A"))

    def _is_new_status(self, noted: dict) -> bool:
        """Whether the run has said how it ended since it was submitted."""
        found, before = identity_of(self._status), noted.get("status_before")
        return found is not None and (before is None or tuple(before) != found)

    def _code_by_slurm(self, noted: dict) -> int:
        """How a job ended that has said nothing itself: never started, killed, or its node lost."""
        number = noted.get("number", "")
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
    try:
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError as error:
        raise EnvironmentFailure(f"{words[0]} is not installed here") from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFailure(f"{words[0]} has not answered in {ANSWER_SECONDS:.0f} s") from error
