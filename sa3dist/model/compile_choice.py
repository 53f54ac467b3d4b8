"""Whether a run on a CUDA device compiles. Imports no torch: a start decides this before torch is imported."""

# Compiling takes about half a minute; runs of at least this many steps gain more than that.
MIN_STEPS = 200


def compiles_on_cuda(choice: str, steps: int) -> bool:
    """choice: auto, on or off; ``auto`` compiles runs of at least MIN_STEPS."""
    return choice == "on" or (choice == "auto" and steps >= MIN_STEPS)
