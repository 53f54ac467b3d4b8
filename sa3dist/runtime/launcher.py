"""The launcher's environment variables, which are valid before and after the process group exists."""

import os

from sa3dist.errors import ConfigError

# On the CPU Accelerate uses MPI's rank if there is no other.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_MEND = "unset it, or start with torchrun or accelerate launch"


def dist_rank_from_environment() -> int:
    """Rank from the launcher's environment; 0 if that is not below the world size, so that somebody reports the end."""
    dist_rank = _number("RANK")
    return dist_rank if dist_rank < _number("WORLD_SIZE") else 0


def has_peers() -> bool:
    """Whether the launcher started more ranks than this one."""
    return _number("WORLD_SIZE") > 1


def check() -> None:
    """Raise ConfigError if a launcher's variable is not a number, or others are missing: the process would train alone.

    Rank 0 and a world size of 1 need no others. Some programs write -1 for unset.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, "-1")
        if text != "-1" and not text.isdecimal():
            raise ConfigError(f"{name}={text} in the environment: expected a number, as launchers set it; {_MEND}")
    world_size = _number("WORLD_SIZE", 1)
    for name in ("RANK", "LOCAL_RANK"):
        if (number := _number(name)) >= max(world_size, 1):
            said = f"WORLD_SIZE={world_size}" if "WORLD_SIZE" in os.environ else "no WORLD_SIZE"
            raise ConfigError(f"{name}={number} in the environment, but {said}: no launcher sets that; {_MEND}")
    if world_size > 1 and not any(name in os.environ for name in _RANKS):
        raise ConfigError(f"WORLD_SIZE={world_size} in the environment, but no RANK; {_MEND}")


def check_joined(world_size: int) -> None:
    """Raise ConfigError if the process group has another size than the launcher said."""
    said = max(_number("WORLD_SIZE", 1), 1)
    if said != world_size:
        # Accelerate joins no group on a GPU without it.
        hint = "" if "LOCAL_RANK" in os.environ else ", for LOCAL_RANK is not set"
        raise ConfigError(f"WORLD_SIZE={said} in the environment, but {world_size} joined{hint}; {_MEND}")


def batch_job() -> str | None:
    """Id of the batch job that this process belongs to, the same when the job is requeued; None outside of one."""
    return os.environ.get("SLURM_JOB_ID")


def requeued_job() -> str | None:
    """``batch_job`` if its scheduler has started it before, with the same command; else None."""
    return batch_job() if _number("SLURM_RESTART_COUNT") else None


def _number(name: str, otherwise: int = 0) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise
