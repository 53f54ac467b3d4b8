"""Micro batches by index, the loader processes that make them, and how these processes end."""

import contextlib
import errno
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sa3dist.data.batches.micro_batch import MicroBatch, Sample, SampleSettings, collate, draw_sample
from sa3dist.data.batches.order import clip_order, micro_batch_slots
from sa3dist.data.latents.cache import EncodedClips, frames_of
from sa3dist.errors import Interrupted, SA3DistError
from sa3dist.flow.crops import polarity_of_slot
from sa3dist.formats import ClipEntry
from sa3dist.runtime.exit_status import no_shared_memory
from sa3dist.runtime.signals import SIGNALS, kill_loaders


def micro_indices(steps: Iterable[int], accumulation: int, dist_rank: int, world_size: int) -> Iterator[int]:
    """Global indices of one rank's micro batches for ``steps`` (from 1), in training order."""
    for step in steps:
        for round_ in range(accumulation):
            yield ((step - 1) * accumulation + round_) * world_size + dist_rank


class MicroBatches(Dataset):
    """Micro batch by global index. Loader processes do the reading, cropping, drawing and coupling."""

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
        """The clip of a slot, and whether it is phase-flipped."""
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
    """Micro batches in the order of ``indices``, made ahead of time by loader processes.

    before   called in this process with each index before it goes to a loader process. If it raises, the iteration
             ends at once, even if finished micro batches are waiting
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
            # Raised after the loop: raised inside the DataLoader, the traceback would keep its processes alive at exit.
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


def share(tensors: Iterable[torch.Tensor]) -> None:
    """In a loader process, move tensors to shared memory. Raises EnvironmentFailure if it is full.

    The DataLoader would do so in a thread, where a failure goes unnoticed and the main process waits for ever.
    """
    if get_worker_info() is None:
        return
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise no_shared_memory(str(error)) from error


@contextlib.contextmanager
def explaining_full_shared_memory() -> Iterator[None]:
    """Wraps the creation of locks and queues, which use shared memory. Raises EnvironmentFailure if it is full."""
    try:
        yield
    except OSError as error:
        # An error that names a file is about that file's disk.
        if error.errno == errno.ENOSPC and error.filename is None:
            raise no_shared_memory(error.strerror) from error
        raise


@contextlib.contextmanager
def killing_loaders_when_interrupted() -> Iterator[None]:
    """On Interrupted, kill the loader processes: the DataLoader would wait up to 5 s for each of them in turn."""
    try:
        yield
    except Interrupted:
        kill_loaders()
        raise


def leave_signals_to_the_main_process(worker: int) -> None:
    # A terminal's Ctrl-C and Slurm's signals reach the whole process group. A worker that dies of one fails the step.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def results_of_workers(
    dataset: Dataset, num_workers: int, device: torch.device, sampler: Iterable[int] | None = None
) -> Generator[Any, None, None]:
    """The items of ``dataset`` from loader processes, in order; in pinned memory if ``device`` is CUDA.

    An SA3DistError is returned as an item: raised in a worker, its message would be buried under a traceback.
    """
    data_loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
    )
    # A variable keeps the iterator alive: ``yield from`` alone would drop it, and wait for its processes, before they
    # can be killed.
    with explaining_full_shared_memory():
        results = iter(data_loader)
    try:
        with killing_loaders_when_interrupted():
            yield from results
    finally:
        # Not left to the iterator's end: in Python 3.12 the traceback of an error in the sampler refers to its callers'
        # frames, and so to the iterator; its processes would live as long as the error.
        if num_workers:
            results._shutdown_workers()
