"""How a program ends: one message, status.json, and the matching exit code."""

import argparse
import contextlib
import errno
import json
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sa3dist import errors
from sa3dist.formats import STATUS_DIR_VARIABLE, STATUS_NAME, write_json
from sa3dist.runtime import run_lock
from sa3dist.runtime.launcher import dist_rank_from_environment, has_peers

# The step that ran out of memory, if the run's next start is to recompute blocks.
OUT_OF_MEMORY_KEY = "out_of_memory_at_step"
# What work_dir held when max_wall_time ended the run before a step.
KEPT_KEY = "kept_in_work_dir"
HEARTBEAT_NAME = "heartbeat.json"
STATES = {
    errors.EXIT_DONE: "done",
    errors.EXIT_USER: "refused",
    errors.EXIT_ENVIRONMENT: "failed",
    errors.EXIT_INTERRUPTED: "interrupted",
    errors.EXIT_BUG: "crashed",
}


ENVIRONMENT_ERRNOS = {
    getattr(errno, name)
    for name in (
        "EROFS",
        "EACCES",
        "EPERM",
        "ESTALE",
        "EIO",
        "EEXIST",
        # The user's own paths are checked earlier, by name: a folder of the run was moved away meanwhile.
        "ENOENT",
        "ENOTDIR",
        "EISDIR",
        "ENAMETOOLONG",
        "EMFILE",
        "ENFILE",
        "EFBIG",
        # A process could not be started.
        "EAGAIN",
        "ENOMEM",
    )
}
# On the CPU both torch's allocator and oneDNN raise a plain RuntimeError when memory runs out; which of them fails
# first is chance.
NO_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory", "could not execute a primitive"
SHARED_MEMORY = "/dev/shm"
# How long another rank waits for rank 0 to report a failure that rank 0 knows of too.
REPORT_SECONDS = 3.0


def translate(failure: BaseException) -> errors.SA3DistError | None:
    """The explained error for a library's exception; None if the exception is a bug of ours."""
    if isinstance(failure, errors.SA3DistError):
        return failure
    if isinstance(failure, KeyboardInterrupt):
        return errors.Interrupted("interrupted; finished work is kept, run the same command to continue")
    # Imported late: refusing settings does not need torch.
    import torch

    no_host_memory = any(words in str(failure) for words in NO_HOST_MEMORY)
    if isinstance(failure, torch.OutOfMemoryError | MemoryError) or no_host_memory:
        return errors.OutOfMemory(
            f"out of memory ({errors.first_line(failure)}); try gradient_checkpointing=on (or on_oom=adapt, with which "
            f"the next start does so by itself), a smaller batch_size or a shorter duration"
        )
    if isinstance(failure, OSError):
        # Of a rename the target: the other name is a temporary one.
        named = failure.filename2 or failure.filename
        where = f"{named}: " if named else ""
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            return errors.EnvironmentFailure(f"{where}disk full; free space and run again to continue")
        if failure.errno in ENVIRONMENT_ERRNOS:
            return errors.EnvironmentFailure(f"{where}{failure.strerror}; state is as last saved")
    # Gloo reports a dead peer as a plain RuntimeError that names its source file.
    text = str(failure)
    of_gloo = isinstance(failure, RuntimeError) and ("gloo" in text or "Connection closed by peer" in text)
    if isinstance(failure, torch.distributed.DistError) or of_gloo:
        return errors.LostPeer(f"lost contact with another rank ({errors.first_line(failure)}); state is as last saved")
    if "can't start new thread" in text:
        return errors.EnvironmentFailure(f"{text}: a limit of the system; raise ulimit -u; state is as last saved")
    if "DataLoader worker" in text and "Bus error" in text:
        return no_shared_memory(errors.first_line(failure))
    if isinstance(failure, ConnectionError | EOFError) or "DataLoader worker" in text:
        return errors.EnvironmentFailure(
            f"a loader process was killed, by the machine's memory limit perhaps ({errors.first_line(failure)}); "
            f"lower num_workers or run again to continue"
        )
    return None


def no_shared_memory(reason: str) -> errors.EnvironmentFailure:
    """The error of a loader process that cannot hand over a micro batch."""
    if "Too many open files" in reason:
        return errors.EnvironmentFailure(f"a loader process has too many files open ({reason}); raise ulimit -n")
    size = ""
    with contextlib.suppress(OSError):
        found = os.statvfs(SHARED_MEMORY)
        size = f" ({found.f_blocks * found.f_frsize >> 20} MiB, {found.f_bavail * found.f_frsize >> 20} free)"
    return errors.EnvironmentFailure(
        f"{SHARED_MEMORY}{size}: no room for what loader processes hand over ({reason}); give it more "
        f"(docker run --shm-size=2g; Kubernetes: an emptyDir with medium Memory), or set num_workers=0"
    )


def run_program(
    body: Callable[[], None],
    output_dir: Callable[[], Path | None],
    step: Callable[[], int],
    judge: Callable[[BaseException], BaseException] = lambda failure: failure,
) -> int:
    """Run ``body``; report how it ended once, write status.json to the output directory, return the exit code.

    output_dir, step   called when the program ends, since settings may fail to load; no directory = no status.json
    judge              replaces the exception with which ``body`` ends
    """
    problem = None
    try:
        body()
    except (Exception, KeyboardInterrupt) as failure:
        failure = judge(failure)
        problem = translate(failure)
        if problem is None:
            with contextlib.suppress(OSError):
                traceback.print_exception(failure)
            problem = errors.SA3DistError(f"{type(failure).__name__}: {failure}")
    report(problem, output_dir(), step(), REPORT_SECONDS)
    run_lock.release_all()
    return exit_code_of(problem)


def command(
    program: str, arguments: dict[str, dict[str, Any]], work: Callable[[argparse.Namespace], None], **about: Any
) -> Callable[..., int]:
    """Make the ``main(argv=None)`` of a program without output directory and status.json; it returns the exit code.

    arguments   arguments of ``add_argument``, by name        about   arguments of ``ArgumentParser`` beside the name
    work        the program itself, called with the parsed options
    """

    def main(argv: Sequence[str] | None = None) -> int:
        parser = _Parser(prog=program, **about)
        for name, how in arguments.items():
            parser.add_argument(name, **how)
        return run_program(lambda: work(parser.parse_intermixed_args(argv)), lambda: None, lambda: 0)

    return main


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise errors.ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argument type: an int or a float, by ``kind``, from ``low`` to ``high``."""

    def read(text: str) -> Any:
        value = math.nan
        with contextlib.suppress(ValueError):
            value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value

    return read


# No option needs more: processes, nodes, gigabytes.
MANY = 1_000_000
positive = number(int, 1, MANY)


def exit_code_of(failure: BaseException | None) -> int:
    """The exit code of a program that ends with ``failure``; None = success."""
    explained = None if failure is None else translate(failure)
    return errors.EXIT_DONE if failure is None else errors.EXIT_BUG if explained is None else explained.exit_code


def report(problem: errors.SA3DistError | None, directory: Path | None, step: int, patience_seconds: float) -> None:
    """Write once to stderr, and to status.json, how the run ended. None = success.

    Rank 0 reports for all. Another rank waits for it, and reports only if rank 0 did not live to do so.
    patience_seconds   how long to wait for rank 0
    """
    if directory is not None and (isinstance(problem, errors.InUse) or run_lock.is_anothers(directory)):
        # The status there belongs to another run. A supervisor, whose agent turns every code into 1, reads ours
        # elsewhere.
        directory = Path(os.environ[STATUS_DIR_VARIABLE]) if STATUS_DIR_VARIABLE in os.environ else None
    here = dist_rank_from_environment(), socket.gethostname()
    lost = isinstance(problem, errors.LostPeer)
    found_by = None if problem is None or problem.origin is None else problem.origin[0]
    if here[0] != 0:
        if problem is None or directory is None:
            return
        if isinstance(problem, errors.InUse):
            # Rank 0 has reported it, but maybe on another host than this one's supervisor.
            _write_status(directory, problem, problem.origin or here, str(problem), step)
        # output_dir is a file: no place for a status, and rank 0 refuses it too.
        if (found_by == 0 and not lost) or directory.is_file() or has_status(directory, patience_seconds):
            return
    elif directory is not None and (found_by or lost) and has_status(directory, 0):
        # Another rank has reported its own finding, or that this rank is lost.
        return
    message, origin = "done", here
    if problem is not None:
        message, origin = str(problem), problem.origin or here
        # Name rank and host if the failure is not the user's mistake, or only some rank sees it; not with a single
        # process.
        if origin[0] != 0 or (problem.exit_code == errors.EXIT_ENVIRONMENT and has_peers()):
            message = f"rank {origin[0]} on {origin[1]}: {message}"
        # stderr may lead to a full disk; status.json still tells.
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
    if directory is not None:
        _write_status(directory, problem, origin, message, step)


def _write_status(
    directory: Path, problem: errors.SA3DistError | None, origin: tuple[int, str], message: str, step: int
) -> None:
    code = exit_code_of(problem)
    status = {"state": STATES[code], "exit_code": code, "message": message}
    status |= {"dist_rank": origin[0], "host": origin[1], "step": step}
    if isinstance(problem, errors.RecomputeOnRestart):
        status[OUT_OF_MEMORY_KEY] = step + 1
    if isinstance(problem, errors.OutOfTime):
        status[KEPT_KEY] = problem.kept
    try:
        with contextlib.suppress(OSError):
            write_json(directory / STATUS_NAME, status)
            return
        # On a full disk, deleting the heartbeat makes room for the status.
        (directory / HEARTBEAT_NAME).unlink(missing_ok=True)
        write_json(directory / STATUS_NAME, status)
    except NotADirectoryError:
        # output_dir is a file, as the message says; it cannot hold a status.
        return
    except OSError as error:
        print(f"{directory / STATUS_NAME}: cannot write ({error.strerror})", file=sys.stderr, flush=True)


def forget_status(directory: Path) -> int | None:
    """Remove the status of an earlier run: there is none until this run ends.

    Returns the step at which that run ran out of memory with ``on_oom: adapt``, or None.
    """
    noted = None
    # A damaged status has nothing to say.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        noted = json.loads((directory / STATUS_NAME).read_text(encoding="utf-8")).get(OUT_OF_MEMORY_KEY)
    # output_dir may be a file; it is refused a moment later, by name.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (directory / STATUS_NAME).unlink()
    return noted


def has_status(directory: Path, patience_seconds: float) -> bool:
    """Whether a status appears in ``directory`` within ``patience_seconds``."""
    deadline = time.monotonic() + patience_seconds
    while not (directory / STATUS_NAME).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
