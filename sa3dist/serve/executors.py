"""The table of executors."""

from collections.abc import Callable

from sa3dist.errors import ConfigError
from sa3dist.serve.executor import Executor
from sa3dist.serve.kubernetes_executor import Kubernetes
from sa3dist.serve.local_executor import Local
from sa3dist.serve.options import RunOptions
from sa3dist.serve.slurm_executor import Slurm

EXECUTORS: dict[str, Callable[[RunOptions], Executor]] = {
    "local": lambda options: Local(),
    "slurm": Slurm,
    "kubernetes": Kubernetes,
}


def open_executor(options: RunOptions) -> Executor:
    """The executor named in ``options``. Raises ConfigError, or EnvironmentFailure if it cannot work here."""
    if options.executor not in EXECUTORS:
        raise ConfigError(f"executor: {options.executor} is unknown; choose {', '.join(EXECUTORS)}")
    return EXECUTORS[options.executor](options)
