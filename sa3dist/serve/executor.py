"""How the trainer of an attempt is started, watched and ended: on this host, or by a cluster's scheduler."""

import dataclasses
from pathlib import Path
from typing import Protocol

from sa3dist.serve.job import Job
from sa3dist.serve.processes import Mark


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt at a job, as an executor is given it.

    folder     of the attempt                    run       the trainer's output_dir, in it
    request    file with the trainer's settings  log       where the trainer's stdout and stderr go
    processes  of the trainer, on each node      nodes     how many it is spread over
    mark       what its processes carry          handles   descriptors of locks that they hold
    """

    job: Job
    folder: Path
    run: Path
    request: Path
    log: Path
    processes: int
    nodes: int
    mark: Mark
    handles: tuple[int, ...]


class Executor(Protocol):
    """The trainer of one attempt. A scheduler that does not answer raises EnvironmentFailure; it is asked again.

    outlives_shepherd   whether the trainer goes on without it, and the next attempt finds it
    """

    outlives_shepherd: bool

    def start(self, attempt: Attempt) -> None:
        """Start the trainer, or find the one that an earlier attempt has started where those outlive it."""

    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs or waits."""

    def ask_to_stop(self) -> None:
        """Let it save and end."""

    def kill(self) -> bool:
        """End all of it; whether nothing is left. Asked again until that is so."""
