"""Units of work for encoding ahead of training: captions, whole clips of one length, or crops. One rank does each."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sa3dist.data.latents.cache import SILENCE_TAIL_FRAMES, EncodedClips, frames_of
from sa3dist.data.latents.crops import EncodedCrops
from sa3dist.formats import ClipEntry
from sa3dist.model.base import Base
from sa3dist.model.text import begin_imports

# One pass holds no more frames than the longest clip of any base (380 s) has alone.
MAX_PASS_FRAMES = 4160
# A caption costs about as much as a few frames: 256 tokens through a small model.
CAPTION_COST = 4.0
# Clips of this total cost are encoded before the captions, while the text encoder's libraries are imported. Captions
# do not wait for all clips: a fault of the text encoder must show early.
AHEAD_COST = 2.0 * MAX_PASS_FRAMES


@dataclasses.dataclass(frozen=True)
class EncodeTask:
    """One unit of encoding work.

    cost         relative to other tasks, by length
    count        clips or captions
    memory       bytes of what ``load`` returns
    is_missing   whether any of its output is not on disk yet
    load         reads the input of ``encode``, in another thread while the previous task is encoded
    encode       called with the base and what ``load`` returned
    begin        called before any task is encoded
    """

    cost: float
    count: int
    memory: int
    is_missing: Callable[[], bool]
    load: Callable[[], Any]
    encode: Callable[[Base, Any], object]
    begin: Callable[[], object] = lambda: None


def whole_clip_tasks(encoded: EncodedClips, batch: int = 1) -> list[EncodeTask]:
    """Tasks for every clip in both polarities and every distinct caption.

    batch   clips of one length, or captions, per encoder pass
    """
    clips = clip_tasks(encoded, batch)
    ahead = sum(cost <= AHEAD_COST for cost in itertools.accumulate(task.cost for task in clips))
    return clips[:ahead] + caption_tasks(encoded, batch) + clips[ahead:]


def caption_tasks(encoded: EncodedClips, batch: int) -> list[EncodeTask]:
    """Tasks for every distinct caption, ``batch`` per pass: each is padded to the prompt length."""

    def task(captions: Sequence[str]) -> EncodeTask:
        return EncodeTask(
            cost=CAPTION_COST * len(captions),
            count=len(captions),
            memory=0,
            is_missing=lambda: not all(map(encoded.has_prompt, captions)),
            # Wait for the imports here, where a signal still ends the stage, even if another rank has encoded these
            # captions meanwhile: loader processes forked during an import would wait for its lock for ever.
            load=lambda: begin_imports().exception(),
            encode=lambda base, loaded: encoded.encode_prompts(base, captions),
            begin=begin_imports,
        )

    return [task(group) for group in _in_groups(sorted({clip.caption for clip in encoded.clips}), batch)]


def crop_task(encoded: EncodedCrops, clip: ClipEntry, seed: int, slot: int) -> EncodeTask:
    """The task for the crop of one slot. Which crop that is depends on the clip's peaks, known once it is loaded."""
    return EncodeTask(
        cost=1.0,
        count=1,
        memory=encoded.slot_bytes(clip),
        is_missing=lambda: True,
        load=lambda: encoded.load_slot(clip, seed, slot),
        encode=lambda base, loaded_CN: encoded.encode_slot(base, clip, seed, slot, loaded_CN),
    )


def clip_tasks(encoded: EncodedClips, batch: int) -> list[EncodeTask]:
    """Tasks for groups of clips of equal length, longest first, so that all ranks finish at about the same time.

    Both polarities are encoded: the latents of a flipped clip are not the clip's latents flipped.
    """

    def task(clips: Sequence[ClipEntry], frames: int, rows_per_batch: int) -> EncodeTask:
        def encode(base: Base, loaded: Sequence[torch.Tensor]) -> None:
            rows = [(clip, flip, audio) for clip, audio in zip(clips, loaded, strict=True) for flip in (False, True)]
            for batch_rows in _in_groups(rows, rows_per_batch):
                if not all(encoded.has_latents(clip, flipped) for clip, flipped, _ in batch_rows):
                    encoded.encode_together(base, batch_rows)

        return EncodeTask(
            cost=2.0 * frames * len(clips),
            count=len(clips),
            memory=sum(map(encoded.slot_bytes, clips)),
            is_missing=lambda: not all(encoded.has_latents(clip, flip) for clip in clips for flip in (False, True)),
            load=lambda: list(map(encoded.audio, clips)),
            encode=encode,
        )

    by_frames: dict[int, list[ClipEntry]] = {}
    for clip in encoded.clips:
        by_frames.setdefault(frames_of(clip, encoded), []).append(clip)
    tasks = []
    for frames in sorted(by_frames, reverse=True):
        rows = rows_per_pass(frames, batch)
        # A clip takes two rows, one per polarity.
        tasks += [task(clips, frames, rows) for clips in _in_groups(by_frames[frames], max(1, rows // 2))]
    return tasks


def rows_per_pass(frames: int, batch: int) -> int:
    """Rows of ``frames`` to encode in one pass: ``batch``, or as many as fit; at least one."""
    return max(1, min(batch, MAX_PASS_FRAMES // (frames + 2 * SILENCE_TAIL_FRAMES)))


def _in_groups(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]
