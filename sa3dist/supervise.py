"""Run the trainer under any launcher: pass stop signals on, end with the program's own exit code.

    python -m sa3dist.supervise torchrun --nproc-per-node 8 -m sa3dist.train CONFIG.yaml key=value

Launch agents turn every exit code of a worker into 1, and signals reach them, the batch shell or PID 1, not the ranks.
This process can be any of the three. With --slurm-requeue it also puts an interrupted Slurm job back into the queue.
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
# A closed terminal asks to stop as the first of them does.
FORWARDED = tuple(number for number in SIGNALS if number != signal.SIGHUP)
# How long rank 0's status may take to appear here: it may run on another machine of a shared filesystem.
STATUS_SECONDS = 5.0
# How long an agent may outlive the run: cut off from the other hosts' agents it waits for minutes to say goodbye, and
# for half a minute for a rank that is frozen. All ranks have to be gone within a minute of what ended them.
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
        # An agent that is signalled while it already stops its workers may leave them behind.
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
        """Start the command, wait for it, return the exit code the program meant."""
        handle_signals(self._forward)
        status = status_path(self.command)
        before = identity_of(status)
        if self.asked_at is not None:
            return self._without_status(errors.EXIT_INTERRUPTED, status)
        owner = run_lock.peek(status.parent)
        if owner is not None and run_lock.lives(owner):
            # Before a second launch agent asks for the port of the first.
            raise run_lock.refusal(status.parent, owner)
        with tempfile.TemporaryDirectory(prefix="sa3dist-") as elsewhere:
            return self._run(status, before, Path(elsewhere))

    def _run(self, status: Path, before: tuple | None, elsewhere: Path) -> int:
        """elsewhere: where a run says how it ended that may not write to its output directory."""
        names = ",".join(number.name for number in FORWARDED)
        # torchrun reads the first, and so does accelerate when it starts several processes. Without the second a lost
        # store fills pages with torch's C++ stacks, around the one line that says which rank was lost.
        environment = {"TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ | {"PET_SIGNALS_TO_HANDLE": names}
        environment[STATUS_DIR_VARIABLE] = str(elsewhere)
        # A session of its own: a terminal's Ctrl-C then comes here only, and once.
        self.child = subprocess.Popen(self.command, start_new_session=True, env=environment)
        # What came while there was no child to send it to.
        self._pass_on()
        code = self._wait(status, before)
        if code == errors.EXIT_DONE:
            return code
        if (elsewhere / STATUS_NAME).exists():
            return _exit_code_in(elsewhere / STATUS_NAME)
        return self._meant(code, status, before)

    def _wait(self, status: Path, before: tuple | None) -> int:
        """The child's exit code; it is killed, with all it started, when it outlives the run's status for too long."""
        ended_at = None
        while True:
            try:
                return self.child.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                # Rank 0 reports when all is published, another rank when rank 0 has had its time to publish: nobody has
                # anything left to save.
                if not is_replaced(status, before):
                    # Or none again: it was an earlier run's, which ended while this one started.
                    ended_at = None
                elif ended_at is None:
                    ended_at = time.monotonic()
                if ended_at is not None and time.monotonic() - ended_at > LINGER_SECONDS:
                    # The agent, and the ranks, which have sessions of their own. Stopped first: an agent that sees its
                    # ranks end would end with a code of its own.
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
        # Refused for that, and nowhere to say so.
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
        # A signal nobody sent through us: the machine ran out of memory, or someone used kill.
        return errors.EXIT_ENVIRONMENT if code < 0 else code


def _exit_code_in(status: Path) -> int:
    return int(json.loads(status.read_text(encoding="utf-8"))["exit_code"])


def status_path(command: Sequence[str]) -> Path:
    """Where the program started by ``command`` reports its end. Raises ConfigError when it starts another program."""
    if PROGRAM not in command:
        raise errors.ConfigError(f"supervise: no {PROGRAM} in the command; expected ... -m {PROGRAM} CONFIG.yaml ...")
    # Imported late: it is slow, and signals must be caught meanwhile.
    from sa3dist import config

    words = [word for word in command[list(command).index(PROGRAM) + 1 :] if not word.startswith("-")]
    values: dict = {}
    # What cannot be read the program itself reports, in the directory that follows from the rest.
    with contextlib.suppress(errors.ConfigError):
        config.read_arguments(words, values)
    return config.output_dir_of(values) / STATUS_NAME


def identity_of(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns


def is_replaced(path: Path, before: tuple[int, int] | None) -> bool:
    """Whether there is a file other than the one that ``before`` identifies, as far as can be seen now."""
    try:
        # None: the run has removed what an earlier one said, and not ended yet.
        return identity_of(path) not in (before, None)
    except OSError:
        # A filesystem of the network that fails for a moment must not leave the run unsupervised; it is asked again.
        return False


def requeue_slurm_job() -> None:
    """Queue this job again, unless Slurm is ending it: it requeues a preempted job itself, a cancelled one is over.

    Queueing again makes Slurm kill what is left of the job's processes, this one among them.
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
