"""The errors users see, their exit codes, and how messages write names, counts and times."""

import re
from collections.abc import Sequence
from typing import Any

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_ENVIRONMENT = 70
EXIT_INTERRUPTED = 75


class SA3DistError(Exception):
    """Base of all failures that we explain: one message, no traceback, a fixed exit code.

    origin   (dist_rank, host) where it was raised; None = here
    """

    exit_code = EXIT_BUG
    origin: tuple[int, str] | None = None


class ConfigError(SA3DistError):
    """A setting is unknown, out of range or contradicts another."""

    exit_code = EXIT_USER


class InUse(ConfigError):
    """Another run writes to the output directory; nothing in it is touched."""


class DataError(SA3DistError):
    """A clip, caption or archive cannot be used. The message may hold several lines, one per problem."""

    exit_code = EXIT_USER


class CheckpointError(SA3DistError):
    """A model directory, adapter file or training checkpoint does not fit."""

    exit_code = EXIT_USER


class DamagedCheckpoint(CheckpointError):
    """A training checkpoint is not as it was saved; the one before it may be."""


class EnvironmentFailure(SA3DistError):
    """The machine, the cluster or the numbers failed; the state is as last saved."""

    exit_code = EXIT_ENVIRONMENT


class LostPeer(EnvironmentFailure):
    """Another rank is gone or silent; that rank reports the reason, if there is one."""


class OutOfMemory(EnvironmentFailure):
    """A step did not fit into memory; a smaller one may."""


class RecomputeOnRestart(OutOfMemory):
    """OutOfMemory with ``on_oom: adapt``: the run's next start recomputes blocks. Nothing new was saved."""

    exit_code = EXIT_INTERRUPTED


class Interrupted(SA3DistError):
    """A signal or a time limit stopped the run after its state was saved."""

    exit_code = EXIT_INTERRUPTED


class OutOfTime(Interrupted):
    """max_wall_time ended a start before its first step.

    kept   what ``work_dir`` held then, for the next start to compare; None = not looked up yet
    """

    kept: list[int] | None = None


def printable(name: str) -> str:
    """``name`` with control characters and broken encodings escaped, so that a message stays one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Sequence[str], count: int, most: int = 3) -> str:
    """``a, b, c and 37 more``: the first ``most`` of ``count`` names, printable; empty without names."""
    more = f" and {count - most} more" if names and count > most else ""
    return ", ".join(map(printable, names[:most])) + more


def counted(number: int, one: str, many: str = "") -> str:
    """``1 clip``, ``2 clips``; ``many`` for irregular plurals."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def span(seconds: float) -> str:
    """A duration to about three digits: ``4.0 s``, ``12.5 minutes``, ``2.50 hours``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.2f} hours"


def read_duration(value: Any) -> Any:
    """Seconds of H:MM:SS or Slurm's D-H:MM:SS; any other value is returned unchanged."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", value.strip()) if isinstance(value, str) else None
    if found is None:
        return value
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
