"""Micro batches by index, made by loader processes, and how these processes end."""

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
    """Indices of one rank's micro batches for ``steps``, counted from 1, in training order."""
    for step in steps:
        for round_ in range(accumulation):
            yield ((step - 1) * accumulation + round_) * world_size + dist_rank


class MicroBatches(Dataset):
    """Micro batch by its global index. Runs in the loader's workers: reading, cropping, drawing and coupling."""

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
        """The clip a slot trains on, and whether its polarity is flipped."""
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

    before   called here with each index just before a worker gets it; encodes what the micro batch lacks. What it
             raises ends the iteration, even before micro batches that the workers have ready
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


def share(tensors: Iterable[torch.Tensor]) -> None:
    """In a loader process, move tensors to shared memory. Raises EnvironmentFailure when there is no room.

    The loader itself would do so in a thread, where a failure is lost: the main process would then wait for ever.
    """
    if get_worker_info() is None:
        return
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise no_shared_memory(str(error)) from error


@contextlib.contextmanager
def naming_shared_memory() -> Iterator[None]:
    """For code that makes a loader's locks and queues, which need shared memory too. Raises EnvironmentFailure."""
    try:
        yield
    except OSError as error:
        # An error that names a file is about that file.
        if error.errno == errno.ENOSPC and error.filename is None:
            raise no_shared_memory(error.strerror) from error
        raise


@contextlib.contextmanager
def hanging_processes_left_behind() -> Iterator[None]:
    """Kill the loader processes when a wait for them is interrupted: ending them takes up to 5 s each, one by one."""
    try:
        yield
    except Interrupted:
        kill_loaders()
        raise


def leave_signals_to_the_main_process(worker: int) -> None:
    # Ctrl-C and Slurm's signals reach the whole process group; a worker killed by one would fail the step.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def results_of_workers(
    dataset: Dataset, num_workers: int, device: torch.device, sampler: Iterable[int] | None = None
) -> Generator[Any, None, None]:
    """What loader processes make of ``dataset``, in order; in pinned memory if ``device`` is CUDA.

    An SA3DistError is returned as a value: raised in a worker, its one line would be buried under a traceback.
    """
    ready = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
    )
    # Keep a reference: without one the loop would drop the iterator, and wait for its processes, before they can be
    # killed.
    with naming_shared_memory():
        results = iter(ready)
    try:
        with hanging_processes_left_behind():
            yield from results
    finally:
        del results
