"""Numbers in sentences: one clip, two clips; seconds in the unit that shows them."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """``1 clip``, ``2 clips``; ``many`` where an s is not enough."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def span(seconds: float) -> str:
    """A time to three digits or so: ``4.0 s``, ``12.5 minutes``, ``2.50 hours``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.2f} hours"
