"""The interface of executors, which start, watch and end the trainer of an attempt, locally or on a cluster."""

import dataclasses
from pathlib import Path
from typing import Protocol

from sa3dist.serve.job import Job
from sa3dist.serve.processes import Mark


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt at a job.

    folder      of the attempt
    run         the trainer's output_dir, in ``folder``
    request     file with the trainer's settings
    log         file for the trainer's stdout and stderr
    processes   of the trainer per node
    nodes       number of nodes
    mark        identifies its processes; in their environment
    handles     descriptors of the locks its processes hold
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
    """Runs the trainer of one attempt. Methods raise EnvironmentFailure if a scheduler does not answer; call again.

    outlives_runner   whether the trainer continues without its runner, and the next attempt finds it
    """

    outlives_runner: bool

    def start(self, attempt: Attempt) -> None:
        """Start the trainer; if trainers outlive their runners, first look for one from an earlier attempt."""

    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs or waits."""

    def ask_to_stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> bool:
        """Kill all its processes; returns whether none is left. Call again until then."""
