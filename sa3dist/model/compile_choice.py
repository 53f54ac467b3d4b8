"""Whether a run on a CUDA device compiles; imports no torch, so that a start knows before it has imported that."""

# Compiling the functions takes about half a minute; a run this long gains more than that if it gains anything.
STEPS_WORTH_COMPILING = 200


def compiles_on_cuda(choice: str, steps: int) -> bool:
    """choice: auto, on or off. ``auto`` does where a run is long enough."""
    return choice == "on" or (choice == "auto" and steps >= STEPS_WORTH_COMPILING)
