"""What a step that does not fit into memory ends the run with."""

from __future__ import annotations

from sa3dist.errors import EnvironmentFailure, OutOfMemory, RecomputeOnRestart, SA3DistError
from sa3dist.training.run_plan import RunPlan


def ending(problem: OutOfMemory, step: int, plan: RunPlan, recomputing_helps: bool) -> SA3DistError:
    """The failure that ends the run: ``problem`` itself with ``on_oom: fail``.

    recomputing_helps   whether blocks are what filled the memory, and not all of them were recomputed
    """
    if not plan.adapt_memory:
        return problem
    # Without the advice behind it, which holds for other settings.
    found = str(problem).partition("; try ")[0]
    if recomputing_helps:
        return RecomputeOnRestart(
            f"step {step}: {found}; state is as last saved, run the same command to continue with recomputed blocks"
        )
    return EnvironmentFailure(
        f"step {step}: recomputing blocks is not enough to fit into memory, and batch_size ({plan.micro_batch}) "
        f"decides what is trained, so on_oom: adapt can do no more; choose a shorter duration, a lower rank, or "
        f"a smaller batch_size and another output_dir ({found})"
    )
