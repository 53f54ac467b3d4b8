"""Run the trainer under any launcher: forward stop signals, end with the program's own exit code.

    python -m sa3dist.supervise torchrun --nproc-per-node 8 -m sa3dist.train CONFIG.yaml key=value

Launch agents turn every exit code of a worker into 1. Signals reach the agent, the batch shell or PID 1, not the ranks.
This process can replace any of the three. With --slurm-requeue it also requeues an interrupted Slurm job.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sa3dist import errors
from sa3dist.formats import STATUS_DIR_VARIABLE, STATUS_NAME, write_json
from sa3dist.runtime import run_lock
from sa3dist.runtime.signals import SAME_REQUEST_SECONDS, SIGNALS, handle_signals, kill_descendants

PROGRAM = "sa3dist.train"
# Without SIGHUP: a closed terminal is forwarded as SIGTERM.
FORWARDED = tuple(number for number in SIGNALS if number != signal.SIGHUP)
# How long rank 0's status may take to appear here, from another machine of a shared filesystem.
STATUS_SECONDS = 5.0
# How long an agent may outlive the run. Cut off from the other hosts' agents it waits for minutes to say goodbye, and
# for a frozen rank half a minute; but all ranks must be gone within a minute of the failure.
LINGER_SECONDS = 10.0
REQUEUE_OPTION = "--slurm-requeue"


class Supervisor:
    """One command, the signals it is sent, and how it ended."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.asked_at: float | None = None
        self.child: subprocess.Popen | None = None
        self._to_forward: int | None = None

    def _forward(self, number: int, frame) -> None:
        now = time.monotonic()
        # An agent signalled again while it stops its workers may leave them behind.
        if self.asked_at is not None and now - self.asked_at < SAME_REQUEST_SECONDS:
            return
        self.asked_at = now
        self._to_forward = signal.SIGTERM if number == signal.SIGHUP else number
        self._pass_on()

    def _pass_on(self) -> None:
        if self.child is not None and self._to_forward is not None:
            number, self._to_forward = self._to_forward, None
            self.child.send_signal(number)

    def run(self) -> int:
        """Start the command, wait for it, return the exit code that the program meant."""
        handle_signals(self._forward)
        status = status_path(self.command)
        before = identity_of(status)
        if self.asked_at is not None:
            return self._without_status(errors.EXIT_INTERRUPTED, status)
        owner = run_lock.peek(status.parent)
        if owner is not None and run_lock.lives(owner):
            # Refuse here: a second launch agent would collide with the first one's port.
            raise run_lock.refusal(status.parent, owner)
        with tempfile.TemporaryDirectory(prefix="sa3dist-") as elsewhere:
            return self._run(status, before, Path(elsewhere))

    def _run(self, status: Path, before: tuple | None, elsewhere: Path) -> int:
        """elsewhere: status directory for a run that may not write to its output directory."""
        names = ",".join(number.name for number in FORWARDED)
        # PET_SIGNALS_TO_HANDLE is read by torchrun, and by accelerate with several processes. TORCH_CPP_LOG_LEVEL:
        # without it a lost store prints pages of C++ stacks around the one line that names the lost rank.
        environment = {"TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ | {"PET_SIGNALS_TO_HANDLE": names}
        environment[STATUS_DIR_VARIABLE] = str(elsewhere)
        # A session of its own, so that a terminal's Ctrl-C arrives only here, and once.
        self.child = subprocess.Popen(self.command, start_new_session=True, env=environment)
        # Signals that came before the child existed.
        self._pass_on()
        code = self._wait(status, before)
        if code == errors.EXIT_DONE:
            return code
        if (elsewhere / STATUS_NAME).exists():
            return _exit_code_in(elsewhere / STATUS_NAME)
        return self._meant(code, status, before)

    def _wait(self, status: Path, before: tuple | None) -> int:
        """The child's exit code. Kills it, with all it started, when it outlives the run's status for too long."""
        ended_at = None
        while True:
            try:
                return self.child.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                # A status means that rank 0 has published everything, or had its time to: nobody has anything left to
                # save.
                if not is_replaced(status, before):
                    # Reset: an earlier run's status may have been removed while this run started.
                    ended_at = None
                elif ended_at is None:
                    ended_at = time.monotonic()
                if ended_at is not None and time.monotonic() - ended_at > LINGER_SECONDS:
                    # Kill the agent and the ranks, which have sessions of their own. Stop the agent first: otherwise it
                    # sees its ranks end and exits with a code of its own.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.child.pid, signal.SIGSTOP)
                        kill_descendants(self.child.pid)
                        os.killpg(self.child.pid, signal.SIGKILL)

    def _meant(self, code: int, status: Path, before: tuple | None) -> int:
        deadline = time.monotonic() + STATUS_SECONDS
        while not is_replaced(status, before):
            if time.monotonic() > deadline:
                return self._without_status(code, status)
            time.sleep(0.1)
        return _exit_code_in(status)

    def _without_status(self, code: int, status: Path) -> int:
        # output_dir is a file: refused for that, with no place for a status.
        if status.parent.is_file():
            return errors.EXIT_USER
        if run_lock.is_anothers(status.parent):
            return errors.EXIT_INTERRUPTED if self.asked_at is not None else code
        if self.asked_at is not None:
            said = {
                "state": "interrupted",
                "exit_code": errors.EXIT_INTERRUPTED,
                "message": "stopped before the ranks had started; run the same command to continue",
            }
            write_json(status, said | {"dist_rank": 0, "host": socket.gethostname(), "step": 0})
            return errors.EXIT_INTERRUPTED
        # A signal that was not sent through us: out of memory, or someone's kill.
        return errors.EXIT_ENVIRONMENT if code < 0 else code


def _exit_code_in(status: Path) -> int:
    return int(json.loads(status.read_text(encoding="utf-8"))["exit_code"])


def status_path(command: Sequence[str]) -> Path:
    """The status.json of the program started by ``command``. Raises ConfigError for another program."""
    if PROGRAM not in command:
        raise errors.ConfigError(f"supervise: no {PROGRAM} in the command; expected ... -m {PROGRAM} CONFIG.yaml ...")
    # Imported late: the import is slow, and signals must be caught meanwhile.
    from sa3dist import config

    words = [word for word in command[list(command).index(PROGRAM) + 1 :] if not word.startswith("-")]
    values: dict = {}
    # The program itself reports unreadable settings, in the directory that follows from the others.
    with contextlib.suppress(errors.ConfigError):
        config.read_arguments(words, values)
    return config.output_dir_of(values) / STATUS_NAME


def identity_of(path: Path) -> tuple[int, int] | None:
    """Inode and time, which change when a file is replaced; None if there is no file."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns


def is_replaced(path: Path, before: tuple[int, int] | None) -> bool:
    """Whether there is a file other than ``before``; False if that cannot be seen now."""
    try:
        # None: the run has removed the earlier status and has not ended yet.
        return identity_of(path) not in (before, None)
    except OSError:
        # A network filesystem may fail for a moment: keep supervising and ask again.
        return False


def requeue_slurm_job() -> None:
    """Queue this job again, unless Slurm is ending it: Slurm itself requeues a preempted job; a cancelled one is over.

    Slurm then kills the job's remaining processes, this one included.
    """
    job = os.environ["SLURM_JOB_ID"]
    state = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if state == "RUNNING":
        print(f"supervise: interrupted with its state saved, queueing job {job} again", file=sys.stderr, flush=True)
        subprocess.run(["scontrol", "requeue", job], check=True)
    else:
        print(f"supervise: interrupted, job {job} is {state or 'gone'}, not queueing it again", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    command = list(sys.argv[1:] if argv is None else argv)
    requeue = command[:1] == [REQUEUE_OPTION]
    command = command[requeue:]
    try:
        code = Supervisor(command).run()
        if requeue and code == errors.EXIT_INTERRUPTED:
            requeue_slurm_job()
        return code
    except errors.ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"supervise: {error}", file=sys.stderr)
        return errors.EXIT_ENVIRONMENT


if __name__ == "__main__":
    sys.exit(main())
