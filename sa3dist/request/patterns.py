"""Layer patterns of a request: substrings of layer names, with ranges in brackets."""

import itertools
import math
import re
from collections.abc import Sequence

# Longer numbers are taken literally: no layer has them.
RANGE = re.compile(r"\[(\d{1,9})-(\d{1,9})\]")
# The released models have some hundreds of layers. Without a limit a pattern of ten characters could fill the memory.
MAX_TEXTS = 10_000


def expand(pattern: str) -> list[str]:
    """``layers.[0-2].`` into ``layers.0.``, ``layers.1.``, ``layers.2.``; several ranges give every combination.

    A range may be descending; anything else in brackets is literal. Surrounding spaces are dropped.
    """
    pieces = RANGE.split(pattern.strip())
    choices = []
    for start, stop in zip(pieces[1::3], pieces[2::3], strict=True):
        first, last = int(start), int(stop)
        step = 1 if first <= last else -1
        choices.append([str(number) for number in range(first, last + step, step)])
    literals = pieces[0::3]
    return [
        "".join(itertools.chain(*zip(literals, (*numbers, ""), strict=True))) for numbers in itertools.product(*choices)
    ]


def too_many(patterns: Sequence[str]) -> str | None:
    """Why ``patterns`` cannot be expanded; None if they can."""
    sizes = [
        math.prod(abs(int(start) - int(stop)) + 1 for start, stop in RANGE.findall(pattern)) for pattern in patterns
    ]
    if sum(sizes) <= MAX_TEXTS:
        return None
    longest = patterns[sizes.index(max(sizes))]
    return f"expands to more than {MAX_TEXTS} names, {longest[:60]!r} to most of them; write narrower ranges"
