"""The system's limit on open files, against what a run opens."""

import contextlib
import resource

from sa3dist.errors import EnvironmentFailure

# More than any run opens.
ENOUGH = 65_536
# Measured on the CPU: 10 without loader processes, 45 with 2 and 78 with 8 (each has pipes and shared memory open).
_ALONE, _PER_WORKER = 32, 16


def allow_open_files(num_workers: int) -> None:
    """Raise this process's limit on open files as far as the system allows.

    num_workers   loader processes
    Raises EnvironmentFailure if it is still too low: the loader processes would wait forever.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < ENOUGH:
        soft = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
        # Some containers forbid it.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _ALONE + _PER_WORKER * num_workers
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise EnvironmentFailure(
            f"ulimit -n: at most {soft} open files here, num_workers={num_workers} may need {needed}; raise the limit, "
            f"or lower num_workers"
        )
