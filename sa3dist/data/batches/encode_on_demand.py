"""Encode missing latents and prompts just before a loader process reads them; remove crops that are not kept."""

import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import torch

from sa3dist.data.batches.loader import MicroBatches, loader
from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.data.batches.order import micro_batch_slots
from sa3dist.data.source.prefetch import prefetch
from sa3dist.model.base import Base

# Most decoded audio that waits for the encoder.
WAITING_BYTES = 256 << 20
MICRO_BATCHES_AHEAD = 4
# How long closing waits for the reading thread: reading a clip rarely takes longer. A hanging read is abandoned.
CLOSE_SECONDS = 2.0


class EncodeOnDemand:
    """Encodes the clips or crops of upcoming micro batches; another thread reads the audio ahead.

    The encoders are loaded when the first file is missing, and released once all whole clips are encoded.
    """

    def __init__(
        self,
        base: Base,
        micro_batches: MicroBatches,
        before_work: Callable[[str], None] = lambda doing: None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """before_work: called with a description before each clip. If it or check_stop raises, the step ends."""
        self._base, self._micro_batches, self._encoded = base, micro_batches, micro_batches.encoded
        self._before_work, self._check_stop = before_work, check_stop
        # Key and polarity of whole clips known to be encoded.
        self._encoded_clips: set[tuple[str, bool]] = set()
        # Crop files of each micro batch in flight, and how many of these micro batches need each file.
        self._crops_in_flight: deque[list[Path]] = deque()
        self._uses: Counter[Path] = Counter()

    def batches(self, indices: Iterable[int], num_workers: int, device: torch.device) -> Generator[MicroBatch]:
        """The micro batches of ``indices``, in this order, on ``device``."""
        issued, upcoming = itertools.tee(indices)
        self._audio = prefetch(
            self._load,
            (slot for index in upcoming for slot in self._slots(index)),
            lambda slot: self._encoded.slot_bytes(self._micro_batches.clip_of_slot(slot)[0]),
            num_workers=1,
            check_stop=self._check_stop,
            in_flight_bytes=WAITING_BYTES,
            ahead=MICRO_BATCHES_AHEAD * self._micro_batches.settings.micro_batch,
            close_seconds=CLOSE_SECONDS,
        )
        with contextlib.closing(self._audio):
            yield from loader(self._micro_batches, issued, self._encode, num_workers, device, self._remove_used_crops)

    def _slots(self, micro_index: int) -> range:
        return micro_batch_slots(micro_index, self._micro_batches.settings.micro_batch)

    def _load(self, slot: int) -> torch.Tensor | None:
        clip, flipped = self._micro_batches.clip_of_slot(slot)
        if (clip.key, flipped) in self._encoded_clips:
            return None
        return self._encoded.load_slot(clip, self._micro_batches.settings.seed, slot)

    def _encode(self, micro_index: int) -> None:
        paths = []
        for slot in self._slots(micro_index):
            clip, flipped = self._micro_batches.clip_of_slot(slot)
            _, audio_CN = next(self._audio)
            if (clip.key, flipped) in self._encoded_clips:
                continue
            if audio_CN is not None:
                self._before_work(f"encoding clip {clip.key}")
            self._encoded.encode_prompts(self._base, [clip.caption])
            path = self._encoded.encode_slot(self._base, clip, self._micro_batches.settings.seed, slot, audio_CN)
            if path is not None:
                paths.append(path)
            else:
                self._encoded_clips.add((clip.key, flipped))
                if len(self._encoded_clips) == 2 * len(self._encoded.clips):
                    self._base.release_encoders()
        self._uses.update(paths)
        self._crops_in_flight.append(paths)

    def _remove_used_crops(self, micro_index: int) -> None:
        """Called when a micro batch has been read: remove its crops, unless another one in flight needs them."""
        self._uses.subtract(paths := self._crops_in_flight.popleft())
        for path in paths:
            if not self._uses[path] and not self._encoded.keep:
                path.unlink(missing_ok=True)
        self._uses += Counter()
