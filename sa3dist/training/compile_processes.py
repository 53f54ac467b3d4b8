"""The processes that compile ahead, started before the run knows what to compile: their imports take seconds.

Imports no torch: a run starts them before it imports torch itself.
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

# What is compiled, one process each: blocks for micro batches with and without given context, and our own kernels
# outside of blocks, which alone take ten seconds.
CONTEXT, NONE, KERNELS = PROGRAMS = "context", "none", "kernels"
# Name prefix of the file in the compiler's cache that marks a program as cached.
MARK = "ahead-"
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@dataclasses.dataclass(frozen=True)
class Compiling:
    """A process that compiles one program once it is given the settings; given nothing, it ends.

    errors   its stderr
    """

    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    @classmethod
    def start(cls, program: str, environment: Mapping[str, str] | None = None) -> Compiling:
        """environment: replaces this process's. Raises OSError."""
        command = [sys.executable, "-m", "sa3dist.training.compile_ahead", program]
        # A file, not a pipe: a full pipe that nobody reads would block the process.
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        atexit.register(process.kill)
        return cls(process, errors)

    def give(self, what: bytes) -> None:
        """Send the pickled settings, once; b"" ends the process."""
        # A process that has already ended has reported why.
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(what)


def start_early(settings: Settings, dist_rank: int) -> dict[str, Compiling]:
    """Start the processes early if the run will probably need them. Returns them by program; empty if not.

    They are needed where a GPU is expected and nothing was compiled ahead in this ``work_dir`` yet. In doubtful cases
    ``CompilingAhead`` starts them later.
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
    # A start that fails here is repeated, with a message, by ``CompilingAhead``.
    with contextlib.suppress(OSError):
        for program in () if unlikely else PROGRAMS:
            started[program] = Compiling.start(program, environment)
    return started


def end_all(started: dict[str, Compiling]) -> None:
    """End the processes that are not needed."""
    while started:
        started.popitem()[1].give(b"")
