"""Streaming mode: micro batches from shards too many to index, drawn by slot as always, continued where a lane was."""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sa3dist.data.batches.handover import (
    hanging_processes_left_behind,
    leave_signals_to_the_main_process,
    naming_shared_memory,
    share,
)
from sa3dist.data.batches.micro_batch import (
    MicroBatch,
    Sample,
    StreamSettings,
    collate,
    draw_sample,
)
from sa3dist.data.batches.order import micro_batch_slots
from sa3dist.data.batches.shard_stream import ShardClip, ShardSource
from sa3dist.data.batches.worker_shards import Cursor, Lane, LanePlaces
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
from sa3dist.runtime.process_group import Group

log = logging.getLogger(__name__)

# Captions whose features are kept while audio is encoded on the fly.
KEPT_CAPTIONS = 1024

Decoded = tuple[int, ClipEntry, torch.Tensor]


class StreamedClips(EncodedClips):
    """The clips of a streamed data set under one base."""

    def __init__(self, index: StreamedDataset, work_dir: Path, base, *digests: str, max_bytes: int) -> None:
        super().__init__(index, work_dir, base, *digests)
        encoders = self.shards.encoders if index.holds_latents else None
        scratch = Path(work_dir) / "streaming" / index.digest[:16]
        self.source = ShardSource(index.urls, encoders, scratch, max_bytes)

    def check_first(self) -> None:
        """Read the first clip, so that a wrong source or base is refused at once. Raises DataError."""
        lane = Lane(0, 1, 0, 1, 0, 1)
        first = dataclasses.replace(self.source, urls=self.source.urls[:1])
        next(first.clips(lane, Cursor(), buffer=1))

    def sample(self, slot: int, found: ShardClip, settings: StreamSettings) -> Sample:
        """The sample of a slot from a clip of a latent shard."""
        kind = FLIPPED if polarity_of_slot(settings.seed, slot) else LATENTS
        where = Path(found.shard)
        what = f"latents of clip {found.clip.key}"
        latents = clip_latents(unpack_tensors(found.verified(kind, what), where, what, compare=False))
        what = f"prompt features of clip {found.clip.key}"
        tokens_LH = unpack_tensors(found.verified(PROMPT, what), where, what, compare=False)["hidden"]
        prompt = padded_prompt(tokens_LH, self.prompt_tokens)
        return draw_sample(slot, found.clip, latents, prompt, settings, self)


@dataclasses.dataclass
class Handed:
    """What a lane hands over: a micro batch, decoded clips still to be encoded, or what went wrong; and its place.

    repeated   clips of it that the set has given before
    """

    lane: int
    cursor: Cursor
    repeated: int
    content: MicroBatch | list[Decoded] | SA3DistError

    def pin_memory(self) -> Handed:
        if not isinstance(self.content, MicroBatch):
            return self
        return dataclasses.replace(self, content=self.content.pin_memory())


class StreamedBatches(IterableDataset):
    """The micro batches of one rank from its ``first`` on, made by one lane per loader process in turn."""

    def __init__(
        self,
        encoded: StreamedClips,
        settings: StreamSettings,
        group: Group,
        cursors: list[Cursor],
        first: int,
        buffer: int,
    ) -> None:
        """first: how many micro batches this rank has trained on; cursors: of its lanes; buffer: clips a lane mixes."""
        self.encoded, self.settings, self.buffer = encoded, settings, buffer
        self._rank, self._world_size = group.dist_rank, group.world_size
        self._first, self._cursors = first, list(cursors)
        with naming_shared_memory():
            self._ended = multiprocessing.Event()
        self._parent = os.getpid()

    def end(self) -> None:
        """Tell the loader processes that nobody waits for them any more."""
        self._ended.set()

    def __iter__(self) -> Iterator[Handed]:
        worker = get_worker_info()
        begin = self._first + (worker.id if worker else 0)
        # The loader asks its processes in turn; which lane comes next does not depend on where a run was continued.
        lanes = len(self._cursors)
        number = begin % lanes
        cursor, source = self._cursors[number], self.encoded.source
        lane = Lane(self.settings.seed, len(source.urls), self._rank, self._world_size, number, lanes)
        clips = source.clips(lane, cursor, self.buffer, self._should_stop)
        local = begin
        while True:
            slots = micro_batch_slots(local * self._world_size + self._rank, self.settings.micro_batch)
            content: list[Sample] | list[Decoded] = []
            repeats = 0
            try:
                for slot in slots:
                    found, cursor, repeated = next(clips)
                    repeats += repeated
                    content.append(self._read(slot, found))
                if source.encoders is not None:
                    content = collate(content, self.settings)
                    share(content.tensors())
                else:
                    share(audio_CN for _, _, audio_CN in content)
                yield Handed(number, cursor, repeats, content)
            except SA3DistError as problem:
                # As a value: the loader would bury its one line under a worker's traceback.
                yield Handed(number, cursor, repeats, problem)
                return
            local += lanes

    def _read(self, slot: int, found: ShardClip) -> Sample | Decoded:
        if self.encoded.source.encoders is not None:
            return self.encoded.sample(slot, found, self.settings)
        samples_CN, rate = decode(found.content["audio"])
        return slot, found.clip, ready_audio(samples_CN, False, rate, self.encoded.sample_rate_hz)

    def _should_stop(self) -> bool:
        return self._ended.is_set() or (get_worker_info() is not None and os.getppid() != self._parent)


def finisher(
    base,
    encoded: StreamedClips,
    settings: StreamSettings,
    before_work: Callable[[str], None] = lambda doing: None,
) -> Callable[[list[Decoded]], MicroBatch]:
    """A function that encodes decoded clips, whole and in their slot's polarity, and makes the micro batch.

    before_work   called with what is about to be done; what it raises ends the step
    """

    @functools.lru_cache(maxsize=KEPT_CAPTIONS)
    def prompt(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        if base.text_source is not None:
            found = cut_captions(base.text_source, [(f"{caption[:40]!r}", caption)])
            if found and found.tokens:
                log.warning("%s", found.line())
        hidden_BLH, mask_BL = base.encode_hidden([caption])
        return padded_prompt(hidden_BLH[0][mask_BL[0].bool()].cpu(), encoded.prompt_tokens)

    def finish(decoded: list[Decoded]) -> MicroBatch:
        samples = []
        for slot, clip, audio_CN in decoded:
            before_work(f"encoding clip {clip.key}")
            flipped = polarity_of_slot(settings.seed, slot)
            (tensors,) = encoded.encode_rows(base, [(clip, flipped, audio_CN)])
            samples.append(draw_sample(slot, clip, clip_latents(tensors), prompt(clip.caption), settings, encoded))
        return collate(samples, settings)

    return finish


def streaming_loader(
    batches: StreamedBatches,
    finish: Callable[[list[Decoded]], MicroBatch],
    places: LanePlaces,
    num_workers: int,
    device: torch.device,
) -> Generator[MicroBatch, None, None]:
    """The endless micro batches of one rank; ``places.ahead`` follows what has been handed to the loop."""
    # Before the loader forks: each of its processes would take a second to import it.
    import webdataset  # noqa: F401

    ready = DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
    )
    # By a name: the loop alone would let go of the processes, and wait for them, before they can be killed.
    with naming_shared_memory():
        all_handed = iter(ready)
    try:
        with hanging_processes_left_behind():
            for handed in all_handed:
                if isinstance(handed.content, SA3DistError):
                    raise handed.content
                batch = handed.content if isinstance(handed.content, MicroBatch) else finish(handed.content)
                places.ahead[handed.lane] = handed.cursor
                yield dataclasses.replace(batch, repeated_clips=handed.repeated).to(device)
    finally:
        batches.end()
        del all_handed
