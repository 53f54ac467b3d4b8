"""The processes that compile ahead, started before a run knows what they shall compile: their imports take seconds.

Imports no torch: a run starts them before it imports that itself.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sa3dist.model.compile_choice import compiles_on_cuda
from sa3dist.runtime import cuda_driver

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sa3dist.settings import Settings

# What is compiled, a process for each: blocks for micro batches with and without given context, and our own kernels
# that no block runs, which take ten seconds themselves.
CONTEXT, NONE, KERNELS = PROGRAMS = "context", "none", "kernels"
# The file in the compiler's cache that says that a program is there is called so.
MARK = "ahead-"
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@dataclasses.dataclass(frozen=True)
class Compiling:
    """A process that compiles one program as soon as it is given what for; it ends when it is given nothing.

    errors   what it says
    """

    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    @classmethod
    def start(cls, program: str, environment: Mapping[str, str] | None = None) -> Compiling:
        """environment: instead of this process's. Raises OSError."""
        command = [sys.executable, "-m", "sa3dist.training.compile_ahead", program]
        # A file: a pipe that nobody reads would fill up and stop it.
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        atexit.register(process.kill)
        return cls(process, errors)

    def give(self, what: bytes) -> None:
        """Once; b"" ends it."""
        # One that has ended already has said why.
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(what)


def start_early(settings: Settings, dist_rank: int) -> dict[str, Compiling]:
    """By program, those of a run that will probably want them; where it is not certain enough they are started later.

    It is where a GPU is expected, and nothing was compiled ahead in this ``work_dir`` before.
    """
    work = settings.work_dir.resolve()
    environment = {CACHE_VARIABLE: str(work / "compiled"), "TRITON_CACHE_DIR": str(work / "kernels"), **os.environ}
    unlikely = (
        dist_rank != 0
        or not compiles_on_cuda(settings.compile, settings.number_of_steps)
        or settings.adapter_products == "factored"
        or not cuda_driver.expected()
        or any(Path(environment[CACHE_VARIABLE]).glob(f"{MARK}*"))
    )
    started: dict[str, Compiling] = {}
    # What fails here fails again, and is told, when it is due.
    with contextlib.suppress(OSError):
        for program in () if unlikely else PROGRAMS:
            started[program] = Compiling.start(program, environment)
    return started


def end_all(started: dict[str, Compiling]) -> None:
    """Let go of those that are not needed."""
    while started:
        started.popitem()[1].give(b"")
