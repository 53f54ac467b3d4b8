"""Encode what a micro batch still lacks before a loader process reads it; remove what was made for one use."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import torch

from sa3dist.data.batches.loader import MicroBatches, loader
from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.data.batches.order import micro_batch_slots
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.source.prefetch import prefetch
from sa3dist.flow.crops import polarity_of_slot
from sa3dist.formats import ClipEntry

# Decoded audio waiting for the encoder.
WAITING_BYTES = 256 << 20
MICRO_BATCHES_AHEAD = 4
# What reading a clip usually takes at most; a read that hangs is left behind.
CLOSE_SECONDS = 2.0


class EncodeOnDemand:
    """Encodes the clips, or crops, of micro batches on their way to the step; another thread reads the audio ahead.

    The encoders are loaded when the first file is missing, and leave the memory when all whole clips have been seen.
    """

    def __init__(
        self,
        base,
        micro_batches: MicroBatches,
        before_work: Callable[[str], None] = lambda doing: None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """before_work: called with what is about to be done; what it, or check_stop, raises ends the step."""
        self._base, self._micro_batches = base, micro_batches
        self._before_work, self._check_stop = before_work, check_stop
        self._encoded: EncodedClips = micro_batches.encoded
        self._order, self._size = micro_batches.order, micro_batches.settings.micro_batch
        # Number and polarity of the whole clips that have been seen to be encoded.
        self._ready: set[tuple[int, bool]] = set()
        # Files that are removed after their last use: by micro batch, and how many micro batches need each.
        self._held: dict[int, list[Path]] = {}
        self._uses: Counter[Path] = Counter()

    def batches(self, indices: Iterable[int], num_workers: int, device: torch.device) -> Generator[MicroBatch]:
        """The micro batches of ``indices``, in this order, on ``device``."""
        issued, coming = itertools.tee(indices)
        slots = (slot for index in coming for slot in micro_batch_slots(index, self._size))
        self._audio = prefetch(
            self._load,
            slots,
            lambda slot: self._encoded.slot_bytes(self._clip(slot)),
            num_workers=1,
            check_stop=self._check_stop,
            in_flight_bytes=WAITING_BYTES,
            ahead=MICRO_BATCHES_AHEAD * self._size,
            close_seconds=CLOSE_SECONDS,
        )
        with contextlib.closing(self._audio):
            yield from loader(self._micro_batches, issued, self._prepare, num_workers, device, self._used)

    def _clip(self, slot: int) -> ClipEntry:
        return self._encoded.clips[self._order.clip_of_slot(slot)]

    def _whole(self, slot: int) -> tuple[int, bool]:
        return self._order.clip_of_slot(slot), polarity_of_slot(self._order.seed, slot)

    def _load(self, slot: int) -> torch.Tensor | None:
        if self._whole(slot) in self._ready:
            return None
        return self._encoded.load_slot(self._clip(slot), self._order.seed, slot)

    def _prepare(self, micro_index: int) -> None:
        paths = []
        for slot in micro_batch_slots(micro_index, self._size):
            clip = self._clip(slot)
            _, audio_CN = next(self._audio)
            if self._whole(slot) in self._ready:
                continue
            if audio_CN is not None:
                self._before_work(f"encoding clip {clip.key}")
            self._encoded.encode_prompts(self._base, [clip.caption])
            path = self._encoded.encode_slot(self._base, clip, self._order.seed, slot, audio_CN)
            if path is not None:
                paths.append(path)
                continue
            self._ready.add(self._whole(slot))
            if len(self._ready) == 2 * len(self._encoded.clips):
                self._base.release_encoders()
        self._uses.update(paths)
        self._held[micro_index] = paths

    def _used(self, micro_index: int) -> None:
        """The micro batch has been read: crops that no other one on its way needs may go."""
        for path in self._held.pop(micro_index):
            self._uses[path] -= 1
            if not self._uses[path]:
                del self._uses[path]
                self._encoded.let_go(path)
