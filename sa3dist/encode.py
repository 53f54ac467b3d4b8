"""Stage two: clips and captions become latents and prompt features on disk, shared out over the ranks."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from sa3dist.data.batches.order import ClipOrder, micro_batch_slots
from sa3dist.data.batches.read_ahead import WAITING_BYTES, ReadAhead
from sa3dist.data.latents.cache import SILENCE_TAIL_FRAMES, EncodedClips, frames_of
from sa3dist.data.latents.crops import EncodedCrops
from sa3dist.data.source.bounded_map import ordered_map
from sa3dist.flow.crops import polarity_of_slot
from sa3dist.formats import ClipEntry
from sa3dist.progress import progress
from sa3dist.runtime.process_group import Group, run_on_all_ranks
from sa3dist.runtime.signals import StopRequest

# One pass holds no more frames than the longest clip of any base (380 s) has alone.
MAX_PASS_FRAMES = 4160
# A caption costs about as much as a few frames: 256 tokens through a small model.
CAPTION_COST = 4.0


class Piece(Protocol):
    """Work that is done as a whole.

    cost    relative, by length        count   clips or captions in it        memory   bytes of what ``load`` returns
    """

    cost: float
    count: int
    memory: int

    def lacking(self) -> bool:
        """Whether an earlier run has left any of it."""

    def load(self) -> list[torch.Tensor]:
        """What ``encode`` needs, read in another thread while the piece before is encoded."""

    def encode(self, loaded: list[torch.Tensor]) -> None: ...


def encode_all(
    base,
    encoded: EncodedClips,
    group: Group,
    stop: StopRequest,
    order: ClipOrder | None = None,
    slots: int = 0,
    batch: int = 1,
) -> None:
    """Encode every clip in both polarities and every distinct caption; what is on disk already is not done again.

    Where crops are encoded, those of the first ``slots`` slots of ``order`` take the place of the clips.
    batch   clips of one length, or captions, that go through the encoder in one pass

    Each rank takes every world_size-th piece of work; all return together, however long the slowest one takes.
    What shares a pass depends on the data set alone, never on ranks or on what an earlier run has left.
    Raises what failed on any rank, on every rank.
    """
    captions = sorted({clip.caption for clip in encoded.clips})
    pieces: list[Piece] = [CaptionPiece(base, encoded, some) for some in in_groups(captions, batch)]
    if isinstance(encoded, EncodedCrops):
        pieces += [CropPiece(base, encoded, order, slot) for slot in range(slots)]
    else:
        pieces += clip_pieces(base, encoded, batch)
    mine = pieces[group.dist_rank :: group.world_size]
    left = [piece for piece in mine if piece.lacking()]
    total = sum(piece.count for piece in mine)
    held = total - sum(piece.count for piece in left)
    with progress("encode", total, shown=group.is_main) as update:
        run_on_all_ranks(group, "encode", lambda: _encode(left, group, stop, held, update), stop)


def _encode(left: list[Piece], group: Group, stop: StopRequest, held: int, update: Callable[..., None]) -> None:
    begin, whole = time.monotonic(), sum(piece.cost for piece in left)
    done, cost = held, 0.0
    update(done, seconds_left=math.inf if left else 0.0)
    loaded = ordered_map(
        lambda piece: piece.load(),
        left,
        lambda piece: piece.memory,
        num_workers=1,
        in_flight_bytes=WAITING_BYTES,
    )
    with contextlib.closing(loaded):
        for piece, value in loaded:
            group.liveness.progress()
            stop.raise_if_requested("encoding")
            piece.encode(value)
            done, cost = done + piece.count, cost + piece.cost
            update(done, seconds_left=(time.monotonic() - begin) * (whole - cost) / cost)


class CaptionPiece:
    """Captions that are encoded in one pass: every one is padded to the prompt length."""

    memory = 0

    def __init__(self, base, encoded: EncodedClips, captions: Sequence[str]) -> None:
        self._base, self._encoded, self._captions = base, encoded, captions
        self.cost, self.count = CAPTION_COST * len(captions), len(captions)

    def lacking(self) -> bool:
        return not all(self._encoded.has_prompt(caption) for caption in self._captions)

    def load(self) -> list[torch.Tensor]:
        return []

    def encode(self, loaded: list[torch.Tensor]) -> None:
        self._encoded.encode_prompts(self._base, self._captions)


class CropPiece:
    """The crop of one slot; which one it is shows when the clip's peaks have been read."""

    cost, count = 1.0, 1

    def __init__(self, base, encoded: EncodedCrops, order: ClipOrder, slot: int) -> None:
        self._base, self._encoded, self._seed, self._slot = base, encoded, order.seed, slot
        self._clip = encoded.clips[order.clip_of_slot(slot)]
        self.memory = encoded.crop_bytes

    def lacking(self) -> bool:
        return True

    def load(self) -> list[torch.Tensor]:
        crop_CN = self._encoded.load_slot(self._clip, self._seed, self._slot)
        return [] if crop_CN is None else [crop_CN]

    def encode(self, loaded: list[torch.Tensor]) -> None:
        self._encoded.encode_slot(self._base, self._clip, self._seed, self._slot, *loaded)


class ClipPiece:
    """Clips of one length, each in both polarities: the latents of a flipped clip are not the flipped latents."""

    def __init__(self, base, encoded: EncodedClips, clips: Sequence[ClipEntry], frames: int, rows: int) -> None:
        """rows: how many go through the encoder at once, a clip and its flipped self counting as two."""
        self._base, self._encoded, self._clips, self._rows = base, encoded, clips, rows
        self.cost, self.count = 2.0 * frames * len(clips), len(clips)
        # float32 stereo.
        self.memory = 8 * frames * encoded.samples_per_frame * len(clips)

    def lacking(self) -> bool:
        return any(self._encoded.lacks(clip) for clip in self._clips)

    def load(self) -> list[torch.Tensor]:
        return [self._encoded.audio(clip) for clip in self._clips]

    def encode(self, loaded: list[torch.Tensor]) -> None:
        rows = [(clip, flip, audio) for clip, audio in zip(self._clips, loaded, strict=True) for flip in (False, True)]
        for some in in_groups(rows, self._rows):
            if not all(self._encoded.has_latents(clip, flipped) for clip, flipped, _ in some):
                self._encoded.encode_together(self._base, some)


def clip_pieces(base, encoded: EncodedClips, batch: int) -> list[Piece]:
    """Groups of clips of one length, longest first, so that the ranks end at about one time."""
    by_frames: dict[int, list[ClipEntry]] = {}
    for clip in encoded.clips:
        by_frames.setdefault(frames_of(clip, encoded), []).append(clip)
    pieces = []
    for frames in sorted(by_frames, reverse=True):
        rows = rows_per_pass(frames, batch)
        for clips in in_groups(by_frames[frames], max(1, rows // 2)):
            pieces.append(ClipPiece(base, encoded, clips, frames, rows))
    return pieces


def rows_per_pass(frames: int, batch: int) -> int:
    """``batch`` where that many clips of ``frames`` fit into one pass, else as many as fit; at least one."""
    return max(1, min(batch, MAX_PASS_FRAMES // (frames + 2 * SILENCE_TAIL_FRAMES)))


def in_groups(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class FirstUse:
    """Encodes what a micro batch still lacks when its turn has come.

    The encoders are loaded when the first file is missing, and leave the memory when all have been seen.
    """

    def __init__(
        self,
        base,
        encoded: EncodedClips,
        order: ClipOrder,
        micro_batch: int,
        before_work: Callable[[str], None] = lambda doing: None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """before_work: called with what is about to be done; what it, or check_stop, raises ends the step."""
        self._base, self._encoded, self._order, self._micro_batch = base, encoded, order, micro_batch
        self._before_work = before_work
        self.audio = ReadAhead(self._read, micro_batch, check_stop)
        # Number and polarity of the clips that have been seen to be encoded.
        self._ready: set[tuple[int, bool]] = set()

    def _clip_of(self, slot: int) -> tuple[int, bool]:
        return self._order.clip_of_slot(slot), polarity_of_slot(self._order.seed, slot)

    def _read(self, slot: int) -> torch.Tensor | None:
        number, flipped = self._clip_of(slot)
        clip = self._encoded.clips[number]
        if (number, flipped) in self._ready or self._encoded.has_latents(clip, flipped):
            return None
        return self._encoded.audio(clip)

    def prepare(self, micro_index: int) -> None:
        for slot in micro_batch_slots(micro_index, self._micro_batch):
            number, flipped = self._clip_of(slot)
            clip, ready = self._encoded.clips[number], (number, flipped) in self._ready
            if not ready and not self._encoded.has_latents(clip, flipped):
                self._before_work(f"encoding clip {clip.key}")
            audio_CN = self.audio.take(slot)
            if ready:
                continue
            self._encoded.encode_prompts(self._base, [clip.caption])
            self._encoded.encode_latents(self._base, clip, flipped, audio_CN)
            self._ready.add((number, flipped))
            if len(self._ready) == 2 * len(self._encoded.clips):
                self._base.release_encoders()
