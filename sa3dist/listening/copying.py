"""Decides whether previews are copies of training clips: their distance, compared with that of held-out clips."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from sa3dist.errors import counted
from sa3dist.listening.nearest import Match

# With fewer held-out clips, being the nearest of all says too little.
FEWEST_HELD_OUT = 4
# By chance a new clip is nearer than n held-out ones in 1 of n + 1 cases. Being nearer by this factor is rare: in 24
# sets of 30 clips with 6 held out the nearest new clip reached 0.47, the farthest copy 0.36, as in the tests of copies.
MARGIN = 0.42


@dataclasses.dataclass(frozen=True)
class View:
    """One way to compare sounds, mel frames or latents, with its results for held-out clips and previews.

    held_out   distances of held-out clips from their nearest training clips
    matches    match of each preview
    """

    held_out: Sequence[float]
    matches: Sequence[Match]

    def rank(self, number: int) -> float:
        """(1 + held-out clips that are at least as near) / (1 + all of them)."""
        nearer = sum(distance <= self.matches[number].distance for distance in self.held_out)
        return (1 + nearer) / (1 + len(self.held_out))

    def alarms(self, number: int) -> bool:
        """Whether a preview is nearer than any held-out clip, with a margin against chance."""
        return self.matches[number].distance < MARGIN * min(self.held_out)


def row_of(
    step: int, numbers: Sequence[int], views: dict[str, View], held_out: int, seconds_per_frame: float
) -> dict[str, Any]:
    """The row of ``copies.jsonl`` for the previews of a step.

    numbers    of the previews, in the order of the views' ``matches``
    views      "mel" and "latent", at least one of them; the first decides
    """
    reason = None
    if not held_out:
        reason = "copying cannot be judged: no clip is held out; set validation=0.1"
    elif held_out < FEWEST_HELD_OUT:
        reason = (
            f"copying cannot be judged: {counted(held_out, 'clip')} held out, at least {FEWEST_HELD_OUT} are needed; "
            f"raise validation"
        )
    judged = reason is None
    previews = [
        {"number": number, **_about(place, number, views, judged, seconds_per_frame)}
        for place, number in enumerate(numbers)
    ]
    return {"step": step, "previews": previews, "held_out": held_out, "judged": judged, "reason": reason}


def _about(place: int, number: int, views: dict[str, View], judged: bool, seconds_per_frame: float) -> dict[str, Any]:
    row = {"clip": None, "seconds": None, "mel": None, "latent": None, "rank": None, "warning": None}
    row |= {name: round(view.matches[place].distance, 4) for name, view in views.items() if view.matches[place].clip}
    # Mel frames before latents: they change less when a sound's level or encoding changes.
    view = next(iter(views.values()))
    match = view.matches[place]
    if not match.clip:
        # Silence is never a copy.
        return row
    row |= {"clip": match.clip, "seconds": round(match.frame * seconds_per_frame, 2)}
    if judged:
        row["rank"] = round(view.rank(place), 4)
    if judged and view.alarms(place):
        row["warning"] = (
            f"preview {number} sounds like {match.clip} at {row['seconds']} s, nearer than any held-out clip comes to "
            f"one that is trained on (distance {match.distance:.3f}, theirs {min(view.held_out):.3f} and more): "
            "it may be a copy"
        )
    return row
