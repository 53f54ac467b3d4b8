"""Which shards a loader process reads in streaming mode: every shard once in an epoch, and nobody without one.

Shards are dealt to the ranks, a rank's shards to its workers (loader processes), anew in every epoch. A worker that is
through with its own begins the next epoch; none waits for another.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from sa3dist import flow
from sa3dist.errors import CheckpointError, counted

# Shards whose clips are mixed together, and that a continued run reads again from their start to find its cursor.
SEGMENT_SHARDS = 4


class StreamCursor(NamedTuple):
    """Where a worker is: in which epoch, in which segment of its shards, and how many clips of it are used."""

    epoch: int = 0
    segment: int = 0
    used: int = 0


@dataclasses.dataclass(frozen=True)
class WorkerShards:
    """The shards of worker ``number`` of a rank's ``workers``; shards: how many the whole set has."""

    seed: int
    shards: int
    dist_rank: int
    world_size: int
    number: int
    workers: int

    def segments(self, epoch: int) -> tuple[list[list[int]], bool]:
        """Numbers of the shards of one epoch in segments, and whether they are borrowed from another worker.

        A worker that gets none, because shards are fewer than workers, reads another's too: its clips are repeats.
        """
        order = torch.randperm(self.shards, generator=flow.generator_for(self.seed, "shards", epoch)).tolist()
        of_rank = order[self.dist_rank :: self.world_size]
        mine = of_rank[self.number :: self.workers]
        borrowed = not mine
        if borrowed:
            others = of_rank or [order[self.dist_rank % self.shards]]
            mine = [others[self.number % len(others)]]
        return [mine[start : start + SEGMENT_SHARDS] for start in range(0, len(mine), SEGMENT_SHARDS)], borrowed

    def shuffle_seed(self, epoch: int, segment: int) -> int:
        """Seed of the shuffle buffer in one segment: no two workers share one, even on the same shards."""
        worker = self.dist_rank * self.workers + self.number
        return flow.generator_for(self.seed, "segment", epoch, worker, segment).initial_seed()


@dataclasses.dataclass
class RankCursors:
    """Cursors of one rank's workers after what has been trained on, and how many clips of all ranks were repeats.

    ahead   cursors by worker after what the loop has fetched for the step it is at
    """

    cursors: list[StreamCursor]
    repeated: int = 0
    ahead: dict[int, StreamCursor] = dataclasses.field(default_factory=dict)

    def advance(self, repeated: int) -> None:
        """The step is done, and with it what was fetched for it."""
        for worker, cursor in self.ahead.items():
            self.cursors[worker] = cursor
        self.ahead.clear()
        self.repeated += repeated

    @classmethod
    def of(cls, saved: dict[str, Any] | None, dist_rank: int, world_size: int, workers: int) -> RankCursors:
        """As a checkpoint left them, or at the beginning.

        saved   the checkpoint's "stream" value: cursors by rank and worker, repeated
        Raises CheckpointError when other ranks or workers left them: their cursors are no cursors of these.
        """
        if saved is None:
            return cls([StreamCursor()] * workers)
        found = len(saved["cursors"]), len(saved["cursors"][0])
        if found != (world_size, workers):
            raise CheckpointError(
                f"resume: the checkpoint's places in the shards are those of "
                f"{counted(found[0], 'process', 'processes')} with num_workers {found[1]}, this run has {world_size} "
                f"and {workers}; mode: streaming continues with the same only"
            )
        return cls([StreamCursor(*cursor) for cursor in saved["cursors"][dist_rank]], saved["repeated"])
