"""Which shards a loader process reads in streaming mode: every shard once in a pass, and nobody without one.

A lane is one loader process of one rank. Shards are dealt to the ranks, a rank's shards to its lanes, anew in every
pass. A lane that is through with its own begins the next pass; no lane waits for another.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from sa3dist import flow
from sa3dist.errors import CheckpointError, counted

# Shards whose clips are mixed together, and that a continued run reads again from their start to find its place.
SEGMENT_SHARDS = 4


class Cursor(NamedTuple):
    """Where a lane is: in which pass, in which segment of its shards, and how many clips of it are used."""

    passed: int = 0
    segment: int = 0
    used: int = 0


@dataclasses.dataclass(frozen=True)
class Lane:
    """number: which of a rank's ``lanes`` this is; shards: how many the whole set has."""

    seed: int
    shards: int
    dist_rank: int
    world_size: int
    number: int
    lanes: int

    def segments(self, passed: int) -> tuple[list[list[int]], bool]:
        """Numbers of the shards of one pass in segments, and whether they are borrowed from another lane.

        A lane that gets none, because there are fewer shards than lanes, reads another's too: its clips are repeats.
        """
        order = torch.randperm(self.shards, generator=flow.generator_for(self.seed, "shards", passed)).tolist()
        of_rank = order[self.dist_rank :: self.world_size]
        mine = of_rank[self.number :: self.lanes]
        borrowed = not mine
        if borrowed:
            others = of_rank or [order[self.dist_rank % self.shards]]
            mine = [others[self.number % len(others)]]
        return [mine[start : start + SEGMENT_SHARDS] for start in range(0, len(mine), SEGMENT_SHARDS)], borrowed

    def shuffle_seed(self, passed: int, segment: int) -> int:
        """Seed of the shuffle buffer in one segment: no two lanes share one, even on the same shards."""
        lane = self.dist_rank * self.lanes + self.number
        return flow.generator_for(self.seed, "segment", passed, lane, segment).initial_seed()


@dataclasses.dataclass
class LanePlaces:
    """Where the lanes of one rank are after what has been trained on, and how many clips of all ranks were repeats.

    ahead   cursors by lane after what the loop has fetched for the step it is at
    """

    cursors: list[Cursor]
    repeated: int = 0
    ahead: dict[int, Cursor] = dataclasses.field(default_factory=dict)

    def advance(self, repeated: int) -> None:
        """The step is done, and with it what was fetched for it."""
        for lane, cursor in self.ahead.items():
            self.cursors[lane] = cursor
        self.ahead.clear()
        self.repeated += repeated

    @classmethod
    def of(cls, saved: dict[str, Any] | None, dist_rank: int, world_size: int, lanes: int) -> LanePlaces:
        """As a checkpoint left them, or at the beginning.

        saved   the checkpoint's "stream" value: cursors by rank and lane, repeated
        Raises CheckpointError when other ranks or lanes left them: their places are no places of these.
        """
        if saved is None:
            return cls([Cursor()] * lanes)
        found = len(saved["cursors"]), len(saved["cursors"][0])
        if found != (world_size, lanes):
            raise CheckpointError(
                f"resume: the checkpoint's places in the shards are those of "
                f"{counted(found[0], 'process', 'processes')} with num_workers {found[1]}, this run has {world_size} "
                f"and {lanes}; mode: streaming continues with the same only"
            )
        return cls([Cursor(*cursor) for cursor in saved["cursors"][dist_rank]], saved["repeated"])
