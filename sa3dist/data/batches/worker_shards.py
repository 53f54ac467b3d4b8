"""Which shards each loader process reads in streaming mode: every shard once per epoch, and every process at least one.

In each epoch shards are shuffled and divided among ranks, then among a rank's workers (loader processes). A worker that
has finished its shards starts the next epoch without waiting for others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from sa3dist import flow
from sa3dist.errors import CheckpointError, counted

# Number of shards shuffled together. A resumed run reads these again from the start to reach its cursor.
SEGMENT_SHARDS = 4


class StreamCursor(NamedTuple):
    """Position of a worker: epoch, segment of its shards, and clips used in the segment."""

    epoch: int = 0
    segment: int = 0
    used: int = 0


@dataclasses.dataclass(frozen=True)
class WorkerShards:
    """The shards of worker ``number`` of a rank's ``workers``. shards: how many the data set has."""

    seed: int
    shards: int
    dist_rank: int
    world_size: int
    number: int
    workers: int

    def segments(self, epoch: int) -> tuple[list[list[int]], bool]:
        """The worker's shard numbers in one epoch, by segment; and whether they are another worker's shards.

        With fewer shards than workers, a worker without its own reads another's; its clips count as repeats.
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
        """Seed of the shuffle buffer in one segment, different for every worker, even on the same shards."""
        worker = self.dist_rank * self.workers + self.number
        return flow.generator_for(self.seed, "segment", epoch, worker, segment).initial_seed()


@dataclasses.dataclass
class RankCursors:
    """Streaming position of one rank.

    cursors    one per worker, after the last finished step
    repeated   repeated clips so far, over all ranks
    ahead      newer cursors by worker, after the micro batches of the current step
    """

    cursors: list[StreamCursor]
    repeated: int = 0
    ahead: dict[int, StreamCursor] = dataclasses.field(default_factory=dict)

    def advance(self, repeated: int) -> None:
        """Call when a step is finished. repeated: its repeated clips, over all ranks."""
        for worker, cursor in self.ahead.items():
            self.cursors[worker] = cursor
        self.ahead.clear()
        self.repeated += repeated

    @classmethod
    def of(cls, saved: dict[str, Any] | None, dist_rank: int, world_size: int, workers: int) -> RankCursors:
        """The cursors of a checkpoint, or new ones if ``saved`` is None.

        saved   the checkpoint's "stream" value: cursors by rank and worker, repeated
        Raises CheckpointError if the number of ranks or workers differs: cursors cannot be converted.
        """
        if saved is None:
            return cls([StreamCursor()] * workers)
        saved_ranks, saved_workers = len(saved["cursors"]), len(saved["cursors"][0])
        if (saved_ranks, saved_workers) != (world_size, workers):
            raise CheckpointError(
                f"resume: the checkpoint was written by {counted(saved_ranks, 'process', 'processes')} with "
                f"num_workers {saved_workers}, this run has {world_size} and {workers}; mode: streaming resumes with "
                f"the same numbers only"
            )
        return cls([StreamCursor(*cursor) for cursor in saved["cursors"][dist_rank]], saved["repeated"])
