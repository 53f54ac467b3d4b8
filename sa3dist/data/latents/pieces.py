"""The units of encoding ahead: captions, whole clips of one length, or crops; one rank encodes each in one go."""

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

# One pass holds at most as many frames as the longest clip of any base (380 s).
MAX_PASS_FRAMES = 4160
# Relative cost of a caption, 256 tokens through a small model: that of a few frames.
CAPTION_COST = 4.0
# Captions come after clips of this many frames, in both polarities: meanwhile the text encoder's libraries are
# imported. Not after all clips: a broken text encoder must show early.
AHEAD_COST = 2.0 * MAX_PASS_FRAMES


@dataclasses.dataclass(frozen=True)
class Piece:
    """A unit of work.

    cost      relative, by length
    count     clips or captions in it
    memory    bytes of what ``load`` returns
    lacking   whether any of it is not on disk yet
    load      reads what ``encode`` needs, in another thread while the piece before is encoded
    encode    called with the base and what was loaded
    begin     called before the first piece is encoded
    """

    cost: float
    count: int
    memory: int
    lacking: Callable[[], bool]
    load: Callable[[], Any]
    encode: Callable[[Base, Any], object]
    begin: Callable[[], object] = lambda: None


def whole_pieces(encoded: EncodedClips, batch: int = 1) -> list[Piece]:
    """Every clip in both polarities, and every distinct caption.

    batch   clips of one length, or captions, that share a pass of the encoder
    """
    clips = clip_pieces(encoded, batch)
    ahead = sum(cost <= AHEAD_COST for cost in itertools.accumulate(piece.cost for piece in clips))
    return clips[:ahead] + caption_pieces(encoded, batch) + clips[ahead:]


def caption_pieces(encoded: EncodedClips, batch: int) -> list[Piece]:
    """Every distinct caption, ``batch`` in one pass: each is padded to the prompt length."""

    def piece(captions: Sequence[str]) -> Piece:
        return Piece(
            cost=CAPTION_COST * len(captions),
            count=len(captions),
            memory=0,
            lacking=lambda: not all(map(encoded.has_prompt, captions)),
            # Wait for the imports here, where a signal still ends the stage, even if others have encoded the captions
            # meanwhile: loader processes forked during an import would hang.
            load=lambda: begin_imports().exception(),
            encode=lambda base, loaded: encoded.encode_prompts(base, captions),
            begin=begin_imports,
        )

    return [piece(some) for some in _in_groups(sorted({clip.caption for clip in encoded.clips}), batch)]


def crop_piece(encoded: EncodedCrops, clip: ClipEntry, seed: int, slot: int) -> Piece:
    """The crop of one slot; its position is known once the clip's peaks have been read."""
    return Piece(
        cost=1.0,
        count=1,
        memory=encoded.slot_bytes(clip),
        lacking=lambda: True,
        load=lambda: encoded.load_slot(clip, seed, slot),
        encode=lambda base, loaded_CN: encoded.encode_slot(base, clip, seed, slot, loaded_CN),
    )


def clip_pieces(encoded: EncodedClips, batch: int) -> list[Piece]:
    """Groups of clips of one length in both polarities, longest first, so that the ranks end at about the same time.

    The latents of a flipped clip are not the flipped latents.
    """

    def piece(clips: Sequence[ClipEntry], frames: int, rows: int) -> Piece:
        def encode(base: Base, loaded: Sequence[torch.Tensor]) -> None:
            work = [(clip, flip, audio) for clip, audio in zip(clips, loaded, strict=True) for flip in (False, True)]
            for some in _in_groups(work, rows):
                if not all(encoded.has_latents(clip, flipped) for clip, flipped, _ in some):
                    encoded.encode_together(base, some)

        return Piece(
            cost=2.0 * frames * len(clips),
            count=len(clips),
            memory=sum(map(encoded.slot_bytes, clips)),
            lacking=lambda: not all(encoded.has_latents(clip, flip) for clip in clips for flip in (False, True)),
            load=lambda: list(map(encoded.audio, clips)),
            encode=encode,
        )

    by_frames: dict[int, list[ClipEntry]] = {}
    for clip in encoded.clips:
        by_frames.setdefault(frames_of(clip, encoded), []).append(clip)
    pieces = []
    for frames in sorted(by_frames, reverse=True):
        # A clip and its flipped self are two rows.
        rows = rows_per_pass(frames, batch)
        pieces += [piece(clips, frames, rows) for clips in _in_groups(by_frames[frames], max(1, rows // 2))]
    return pieces


def rows_per_pass(frames: int, batch: int) -> int:
    """``batch`` if that many clips of ``frames`` fit into one pass, else as many as fit; at least one."""
    return max(1, min(batch, MAX_PASS_FRAMES // (frames + 2 * SILENCE_TAIL_FRAMES)))


def _in_groups(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]
