"""Micro batches by index, and the loader whose worker processes make them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator

import torch
from torch.utils.data import Dataset

from sa3dist.data.batches.handover import results_of_workers, share
from sa3dist.data.batches.micro_batch import MicroBatch, Sample, SampleSettings, collate, draw_sample
from sa3dist.data.batches.order import clip_order, micro_batch_slots
from sa3dist.data.latents.cache import EncodedClips, frames_of
from sa3dist.errors import SA3DistError
from sa3dist.flow.crops import polarity_of_slot
from sa3dist.formats import ClipEntry


def micro_indices(steps: Iterable[int], accumulation: int, dist_rank: int, world_size: int) -> Iterator[int]:
    """Micro batches of one rank for ``steps``, counted from 1, in the order it trains on them."""
    for step in steps:
        for round_ in range(accumulation):
            yield ((step - 1) * accumulation + round_) * world_size + dist_rank


class MicroBatches(Dataset):
    """Micro batch by its global index: the loader's workers do the reading, cropping, drawing and coupling."""

    def __init__(self, encoded: EncodedClips, settings: SampleSettings) -> None:
        self.encoded = encoded
        self.settings = settings
        lengths = [min(settings.crop_frames, frames_of(clip, encoded)) for clip in encoded.clips]
        self.order = clip_order(settings.seed, lengths, settings.micro_batch, settings.bucket_batches)

    def __getitem__(self, micro_index: int) -> MicroBatch | SA3DistError:
        slots = micro_batch_slots(micro_index, self.settings.micro_batch)
        try:
            batch = collate([self._sample(slot) for slot in slots], self.settings)
            share(batch.tensors())
            return batch
        except SA3DistError as problem:
            return problem

    def clip_of_slot(self, slot: int) -> tuple[ClipEntry, bool]:
        """The clip a slot trains on, and whether it is phase-flipped."""
        return self.encoded.clips[self.order.clip_of_slot(slot)], polarity_of_slot(self.settings.seed, slot)

    def _sample(self, slot: int) -> Sample:
        clip, flipped = self.clip_of_slot(slot)
        latents = self.encoded.latents(clip, flipped)
        return draw_sample(slot, clip, latents, self.encoded.prompt(clip.caption), self.settings, self.encoded)


def loader(
    batches: MicroBatches,
    indices: Iterator[int],
    before: Callable[[int], None],
    num_workers: int,
    device: torch.device,
    after: Callable[[int], None] = lambda index: None,
) -> Generator[MicroBatch, None, None]:
    """Micro batches in the order of ``indices``, prepared ahead by worker processes.

    before   called in this process with each index just before its micro batch is handed to a worker; encodes what a
             first use still lacks. What it raises ends the iteration, also ahead of what the workers have ready
    after    called with each index when its micro batch has come back
    """
    issued: deque[int] = deque()
    problems: list[Exception] = []

    def ordered() -> Iterator[int]:
        try:
            for index in indices:
                before(index)
                issued.append(index)
                yield index
        except Exception as problem:
            # Re-raised after the loop: inside the DataLoader the traceback would keep its workers alive at exit.
            problems.append(problem)

    with contextlib.closing(results_of_workers(batches, num_workers, device, ordered())) as results:
        for batch in results:
            if problems:
                break
            if isinstance(batch, SA3DistError):
                raise batch
            after(issued.popleft())
            yield batch.to(device)
    if problems:
        raise problems[0]
