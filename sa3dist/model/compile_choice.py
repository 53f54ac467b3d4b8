"""Whether a run on CUDA compiles. Imports no torch, so that a start can decide before importing it."""

# Compiling takes about half a minute; a run of this many steps gains more than that, if it gains at all.
STEPS_WORTH_COMPILING = 200


def compiles_on_cuda(choice: str, steps: int) -> bool:
    """choice: auto, on or off; ``auto`` compiles if the run is long enough."""
    return choice == "on" or (choice == "auto" and steps >= STEPS_WORTH_COMPILING)
