"""What encoding ahead consists of: captions, whole clips of one length, or crops, each done in one go by one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sa3dist.data.latents.cache import SILENCE_TAIL_FRAMES, EncodedClips, frames_of
from sa3dist.data.latents.crops import EncodedCrops
from sa3dist.formats import ClipEntry

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

    def encode(self, base, loaded: list[torch.Tensor]) -> None: ...


class CaptionPiece:
    """Captions that are encoded in one pass: every one is padded to the prompt length."""

    memory = 0

    def __init__(self, encoded: EncodedClips, captions: Sequence[str]) -> None:
        self._encoded, self._captions = encoded, captions
        self.cost, self.count = CAPTION_COST * len(captions), len(captions)

    def lacking(self) -> bool:
        return not all(self._encoded.has_prompt(caption) for caption in self._captions)

    def load(self) -> list[torch.Tensor]:
        return []

    def encode(self, base, loaded: list[torch.Tensor]) -> None:
        self._encoded.encode_prompts(base, self._captions)


class CropPiece:
    """The crop of one slot; which one it is shows when the clip's peaks have been read."""

    cost, count = 1.0, 1

    def __init__(self, encoded: EncodedCrops, clip: ClipEntry, seed: int, slot: int) -> None:
        self._encoded, self._place = encoded, (clip, seed, slot)
        self.memory = encoded.slot_bytes(clip)

    def lacking(self) -> bool:
        return True

    def load(self) -> list[torch.Tensor | None]:
        return [self._encoded.load_slot(*self._place)]

    def encode(self, base, loaded: list[torch.Tensor | None]) -> None:
        self._encoded.encode_slot(base, *self._place, *loaded)


class ClipPiece:
    """Clips of one length, each in both polarities: the latents of a flipped clip are not the flipped latents."""

    def __init__(self, encoded: EncodedClips, clips: Sequence[ClipEntry], frames: int, rows: int) -> None:
        """rows: how many go through the encoder at once, a clip and its flipped self counting as two."""
        self._encoded, self._clips, self._rows = encoded, clips, rows
        self.cost, self.count = 2.0 * frames * len(clips), len(clips)
        self.memory = sum(encoded.slot_bytes(clip) for clip in clips)

    def lacking(self) -> bool:
        return any(self._encoded.lacks(clip) for clip in self._clips)

    def load(self) -> list[torch.Tensor]:
        return [self._encoded.audio(clip) for clip in self._clips]

    def encode(self, base, loaded: list[torch.Tensor]) -> None:
        rows = [(clip, flip, audio) for clip, audio in zip(self._clips, loaded, strict=True) for flip in (False, True)]
        for some in _in_groups(rows, self._rows):
            if not all(self._encoded.has_latents(clip, flipped) for clip, flipped, _ in some):
                self._encoded.encode_together(base, some)


def whole_pieces(encoded: EncodedClips, batch: int = 1) -> list[Piece]:
    """Every clip in both polarities and every distinct caption.

    batch   clips of one length, or captions, that go through the encoder in one pass
    """
    return caption_pieces(encoded, batch) + clip_pieces(encoded, batch)


def caption_pieces(encoded: EncodedClips, batch: int) -> list[Piece]:
    """Every distinct caption, ``batch`` in one pass."""
    captions = sorted({clip.caption for clip in encoded.clips})
    return [CaptionPiece(encoded, some) for some in _in_groups(captions, batch)]


def clip_pieces(encoded: EncodedClips, batch: int) -> list[Piece]:
    """Groups of clips of one length, longest first, so that the ranks end at about one time."""
    by_frames: dict[int, list[ClipEntry]] = {}
    for clip in encoded.clips:
        by_frames.setdefault(frames_of(clip, encoded), []).append(clip)
    pieces = []
    for frames in sorted(by_frames, reverse=True):
        rows = rows_per_pass(frames, batch)
        for clips in _in_groups(by_frames[frames], max(1, rows // 2)):
            pieces.append(ClipPiece(encoded, clips, frames, rows))
    return pieces


def rows_per_pass(frames: int, batch: int) -> int:
    """``batch`` where that many clips of ``frames`` fit into one pass, else as many as fit; at least one."""
    return max(1, min(batch, MAX_PASS_FRAMES // (frames + 2 * SILENCE_TAIL_FRAMES)))


def _in_groups(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]
