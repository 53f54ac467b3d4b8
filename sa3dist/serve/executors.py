"""The table of executors."""

from __future__ import annotations

from collections.abc import Callable

from sa3dist.serve.executor import Executor
from sa3dist.serve.local_executor import Local
from sa3dist.serve.options import Options
from sa3dist.serve.slurm_executor import Slurm

EXECUTORS: dict[str, Callable[[Options], Executor]] = {"local": lambda options: Local(), "slurm": Slurm}


def open_executor(options: Options) -> Executor:
    """The executor that ``options`` name."""
    return EXECUTORS[options.executor](options)
