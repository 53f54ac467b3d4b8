"""The clip of each slot: a pure function of the seed. Every clip comes once per epoch, optionally grouped by length."""

import functools
from collections.abc import Sequence

import torch

from sa3dist import flow


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, clips: int) -> torch.Tensor:
    """Order of one epoch: int64 permutation of 0..clips-1, depending only on (seed, epoch)."""
    return torch.randperm(clips, generator=flow.generator_for(seed, "order", epoch))


class ClipOrder:
    """The endless sequence of clips. Slot s is in epoch s // clips, so a run's position is one integer."""

    def __init__(self, seed: int, clips: int) -> None:
        self.seed = seed
        self.clips = clips

    def clip_of_slot(self, slot: int) -> int:
        """Index of the slot's clip."""
        epoch, position = divmod(slot, self.clips)
        return int(self.epoch(epoch)[position])

    def epoch(self, epoch: int) -> torch.Tensor:
        """The clips of one epoch in order, int64."""
        return epoch_order(self.seed, epoch, self.clips)


class BucketedOrder(ClipOrder):
    """ClipOrder with clips of similar length in each micro batch, to reduce padding.

    The plain order is cut into windows of ``window`` micro batches. In each, clips are sorted by length and cut into
    micro batches, which are then shuffled. A window is small compared with an epoch, so the order stays close to
    random. A micro batch that spans two epochs keeps its clips.
    """

    def __init__(self, seed: int, lengths: Sequence[int], micro_batch: int, window: int) -> None:
        super().__init__(seed, len(lengths))
        self._lengths = torch.tensor(lengths)
        self._micro_batch = micro_batch
        self._window = window * micro_batch

    # Cached on the class, so that instances stay picklable for spawned worker processes.
    @functools.lru_cache(maxsize=4)  # noqa: B019 - a process has one order, for as long as it lives
    def epoch(self, epoch: int) -> torch.Tensor:
        order = super().epoch(epoch).clone()
        size = self._micro_batch
        # Micro batches are counted over the whole run, so this epoch's first complete one may start later.
        first = -epoch * self.clips % size
        last = first + max(self.clips - first, 0) // size * size
        generator = flow.generator_for(self.seed, "buckets", epoch)
        # All full windows at once, for speed: 100,000 clips have thousands. The last window may be shorter.
        full = first + (last - first) // self._window * self._window
        for start, stop, window in ((first, full, self._window), (full, last, last - full)):
            if stop > start:
                windows_WN = order[start:stop].view(-1, window)
                # Stable: clips of equal length stay in their drawn order.
                sorted_WN = windows_WN.gather(1, torch.argsort(self._lengths[windows_WN], dim=1, stable=True))
                rows = window // size
                drawn = [torch.randperm(rows, generator=generator) for _ in range(len(windows_WN))]
                first_rows = torch.arange(len(windows_WN))[:, None] * rows
                order[start:stop] = sorted_WN.view(-1, size)[(torch.stack(drawn) + first_rows).flatten()].flatten()
        return order


def clip_order(seed: int, lengths: Sequence[int], micro_batch: int, window: int) -> ClipOrder:
    """The order of a run. lengths: trained frames of each clip; window: micro batches sorted together, 1 = none."""
    return BucketedOrder(seed, lengths, micro_batch, window) if window > 1 else ClipOrder(seed, len(lengths))


def micro_batch_slots(micro_index: int, micro_batch: int) -> range:
    return range(micro_index * micro_batch, (micro_index + 1) * micro_batch)
