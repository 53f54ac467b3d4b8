"""Which shards a loader process reads in streaming mode: each shard once per epoch, and no worker without a shard.

Shards are dealt to ranks, and a rank's shards to its workers (loader processes), anew in every epoch. A worker that is
done with its shards begins the next epoch without waiting for others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from sa3dist import flow
from sa3dist.errors import CheckpointError, counted

# Shards whose clips are shuffled together; a continued run rereads them from the start to find its cursor.
SEGMENT_SHARDS = 4


class StreamCursor(NamedTuple):
    """Position of a worker: the epoch, the segment of its shards, and how many clips of the segment are used."""

    epoch: int = 0
    segment: int = 0
    used: int = 0


@dataclasses.dataclass(frozen=True)
class WorkerShards:
    """The shards of worker ``number`` of a rank's ``workers``. shards: how many the whole set has."""

    seed: int
    shards: int
    dist_rank: int
    world_size: int
    number: int
    workers: int

    def segments(self, epoch: int) -> tuple[list[list[int]], bool]:
        """Shard numbers of one epoch, in segments, and whether they are borrowed from another worker.

        With fewer shards than workers, a worker without any also reads another's: its clips are repeats.
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
        """Seed of the shuffle buffer in one segment; differs between workers, even on the same shards."""
        worker = self.dist_rank * self.workers + self.number
        return flow.generator_for(self.seed, "segment", epoch, worker, segment).initial_seed()


@dataclasses.dataclass
class RankCursors:
    """Cursors of one rank's workers after the clips trained on, and the number of repeated clips of all ranks.

    ahead   cursors by worker after the clips fetched for the current step
    """

    cursors: list[StreamCursor]
    repeated: int = 0
    ahead: dict[int, StreamCursor] = dataclasses.field(default_factory=dict)

    def advance(self, repeated: int) -> None:
        """Called when the step is done: its fetched clips are now trained on."""
        for worker, cursor in self.ahead.items():
            self.cursors[worker] = cursor
        self.ahead.clear()
        self.repeated += repeated

    @classmethod
    def of(cls, saved: dict[str, Any] | None, dist_rank: int, world_size: int, workers: int) -> RankCursors:
        """From a checkpoint, or at the beginning.

        saved   the checkpoint's "stream" value: cursors by rank and worker, repeated
        Raises CheckpointError if the number of ranks or workers differs: the cursors would then mean other shards.
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
