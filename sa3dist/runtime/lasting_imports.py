"""Imports without Python's search for cyclic garbage, which would look through what they make again and again."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """For the imports of a start: nothing is searched meanwhile, and what there is at the end never is.

    They make a million objects that stay; looking through them took a second of every start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
