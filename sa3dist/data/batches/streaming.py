"""Streaming mode: micro batches from shards too many to index. Draws depend on the slot; resumes at saved cursors."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
from torch.utils.data import IterableDataset, get_worker_info

from sa3dist.data.batches.loader import (
    explaining_full_shared_memory,
    killing_loaders_when_interrupted,
    results_of_workers,
    share,
)
from sa3dist.data.batches.micro_batch import (
    MicroBatch,
    Sample,
    SampleSettings,
    collate,
    draw_sample,
)
from sa3dist.data.batches.order import micro_batch_slots
from sa3dist.data.batches.shard_stream import ShardClip, ShardSource
from sa3dist.data.batches.worker_shards import RankCursors, StreamCursor, WorkerShards
from sa3dist.data.latents.cache import EncodedClips, clip_latents, padded_prompt
from sa3dist.data.latents.shards import FLIPPED, LATENTS, PROMPT
from sa3dist.data.latents.source import StreamedDataset
from sa3dist.data.latents.tensor_files import unpack_tensors
from sa3dist.data.source.audio import decode
from sa3dist.data.source.cut_captions import cut_captions
from sa3dist.data.source.resample import ready_audio
from sa3dist.errors import SA3DistError
from sa3dist.flow.crops import polarity_of_slot
from sa3dist.formats import ClipEntry
from sa3dist.model.base import Base
from sa3dist.model.packing import TensorFields

log = logging.getLogger(__name__)

# Prompt features cached in memory while streamed audio is encoded.
CACHED_CAPTIONS = 1024

Decoded = tuple[int, ClipEntry, torch.Tensor]


class StreamedClips(EncodedClips):
    """The clips of a streamed data set for one base."""

    def __init__(self, index: StreamedDataset, work_dir: Path, base: Base, *digests: str, max_bytes: int) -> None:
        super().__init__(index, work_dir, base, *digests)
        encoders = self.shards.encoders if index.holds_latents else None
        self.source = ShardSource(index.urls, encoders, Path(work_dir) / "streaming" / index.digest[:16], max_bytes)

    def check_first(self) -> None:
        """Read the first clip, to refuse a wrong source or base at once. Raises DataError."""
        first = dataclasses.replace(self.source, urls=self.source.urls[:1])
        next(first.clips(WorkerShards(0, 1, 0, 1, 0, 1), StreamCursor(), buffer=1))

    def sample(self, slot: int, shard_clip: ShardClip, settings: SampleSettings) -> Sample:
        """The sample of a slot from a clip of a latent shard."""

        def tensors(kind: str, what: str) -> dict[str, torch.Tensor]:
            return unpack_tensors(shard_clip.verified(kind, what), Path(shard_clip.shard), what, compare=False)

        clip = shard_clip.clip
        kind = FLIPPED if polarity_of_slot(settings.seed, slot) else LATENTS
        latents = clip_latents(tensors(kind, f"latents of clip {clip.key}"))
        tokens_LH = tensors(PROMPT, f"prompt features of clip {clip.key}")["hidden"]
        return draw_sample(slot, clip, latents, padded_prompt(tokens_LH, self.prompt_tokens), settings, self)


@dataclasses.dataclass
class WorkerOutput(TensorFields):
    """What a worker returns: a micro batch or decoded clips to encode, and the worker's cursor after them.

    repeated   number of these clips that the data set has already given before
    """

    worker: int
    cursor: StreamCursor
    repeated: int
    content: MicroBatch | list[Decoded]


class StreamedBatches(IterableDataset):
    """The micro batches of one rank from number ``first`` on, made by its workers (loader processes) in turn."""

    def __init__(
        self,
        encoded: StreamedClips,
        settings: SampleSettings,
        dist_rank: int,
        world_size: int,
        cursors: list[StreamCursor],
        first: int,
        buffer: int,
    ) -> None:
        """first: micro batches this rank has trained on; cursors: one per worker; buffer: clips in a shuffle buffer."""
        self.encoded, self.settings, self.buffer = encoded, settings, buffer
        self._rank, self._world_size = dist_rank, world_size
        self._first, self._cursors = first, list(cursors)
        with explaining_full_shared_memory():
            # Set when the main process no longer waits for its loader processes.
            self.ended = multiprocessing.Event()
        self._parent = os.getpid()

    def __iter__(self) -> Iterator[WorkerOutput | SA3DistError]:
        process = get_worker_info()
        begin = self._first + (process.id if process else 0)
        # The loader asks its processes in turn. Map them to workers so that the next worker is the same after a resume.
        workers = len(self._cursors)
        number = begin % workers
        cursor, source = self._cursors[number], self.encoded.source
        shards = WorkerShards(self.settings.seed, len(source.urls), self._rank, self._world_size, number, workers)
        clips = source.clips(shards, cursor, self.buffer, self._should_stop)
        for local in itertools.count(begin, workers):
            slots = micro_batch_slots(local * self._world_size + self._rank, self.settings.micro_batch)
            content: list[Sample] | list[Decoded] = []
            repeats = 0
            try:
                for slot in slots:
                    shard_clip, cursor, repeated = next(clips)
                    repeats += repeated
                    content.append(self._read(slot, shard_clip))
                if source.encoders is not None:
                    content = collate(content, self.settings)
                    share(content.tensors())
                else:
                    share(audio_CN for _, _, audio_CN in content)
            except SA3DistError as problem:
                yield problem
                return
            yield WorkerOutput(number, cursor, repeats, content)

    def _read(self, slot: int, shard_clip: ShardClip) -> Sample | Decoded:
        if self.encoded.source.encoders is not None:
            return self.encoded.sample(slot, shard_clip, self.settings)
        samples_CN, rate = decode(shard_clip.content["audio"])
        return slot, shard_clip.clip, ready_audio(samples_CN, False, rate, self.encoded.sample_rate_hz)

    def _should_stop(self) -> bool:
        return self.ended.is_set() or (get_worker_info() is not None and os.getppid() != self._parent)


def encoder_of_decoded(
    base: Base,
    encoded: StreamedClips,
    settings: SampleSettings,
    before_work: Callable[[str], None] = lambda doing: None,
) -> Callable[[list[Decoded]], MicroBatch]:
    """Returns a function that encodes whole decoded clips, in their slots' polarity, and makes the micro batch.

    before_work   called with a description before each clip; if it raises, the step ends
    """

    @functools.lru_cache(maxsize=CACHED_CAPTIONS)
    def prompt(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        if base.text_source is not None:
            cut = cut_captions(base.text_source, [(f"{caption[:40]!r}", caption)])
            if cut and cut.tokens:
                log.warning("%s", cut.line())
        hidden_BLH, mask_BL = base.encode_hidden([caption])
        return padded_prompt(hidden_BLH[0][mask_BL[0].bool()].cpu(), encoded.prompt_tokens)

    def encode(decoded: list[Decoded]) -> MicroBatch:
        samples = []
        for slot, clip, audio_CN in decoded:
            before_work(f"encoding clip {clip.key}")
            (tensors,) = encoded.encode_rows(base, [(clip, polarity_of_slot(settings.seed, slot), audio_CN)])
            samples.append(draw_sample(slot, clip, clip_latents(tensors), prompt(clip.caption), settings, encoded))
        return collate(samples, settings)

    return encode


def streaming_loader(
    batches: StreamedBatches,
    encode: Callable[[list[Decoded]], MicroBatch],
    cursors: RankCursors,
    num_workers: int,
    device: torch.device,
) -> Generator[MicroBatch, None, None]:
    """The endless micro batches of one rank. Updates ``cursors.ahead`` with each one yielded."""
    # Import it before the loader forks: each of its processes would take a second for it.
    import webdataset  # noqa: F401

    outputs = results_of_workers(batches, num_workers, device)
    with contextlib.closing(outputs), killing_loaders_when_interrupted():
        try:
            for output in outputs:
                if isinstance(output, SA3DistError):
                    raise output
                batch = output.content if isinstance(output.content, MicroBatch) else encode(output.content)
                cursors.ahead[output.worker] = output.cursor
                yield dataclasses.replace(batch, repeated_clips=output.repeated).to(device)
        finally:
            batches.ended.set()
