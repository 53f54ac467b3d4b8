"""Which frames of a padded batch are computed, worked out on the host.

Legend: B clips, T frames of the padded batch, F valid frames of all clips, K tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the valid frames of a padded batch are, clip after clip.

    Lengths are host numbers, so that nothing has to be asked of a device; the loader's workers make it.

    frames    frames of the padded batch
    lengths   valid frames of every clip
    frame_F   places of the valid frames among the B * T flattened ones, int64
    """

    frames: int
    lengths: tuple[int, ...]
    frame_F: Tensor

    @classmethod
    def of(cls, valid_BT: Tensor) -> Packing:
        """The packing of a mask on the CPU, True = valid; any frames, not only leading ones."""
        return cls(valid_BT.shape[1], tuple(valid_BT.sum(1).tolist()), valid_BT.flatten().nonzero().squeeze(1))

    def to(self, device: torch.device, non_blocking: bool = False) -> Packing:
        return dataclasses.replace(self, frame_F=self.frame_F.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Packing:
        return dataclasses.replace(self, frame_F=self.frame_F.pin_memory())

    def clone(self) -> Packing:
        return dataclasses.replace(self, frame_F=self.frame_F.clone())


@dataclasses.dataclass(frozen=True)
class FilledPacking:
    """A packing brought to a given number of tokens by one more clip, which attends only to itself and enters no loss.

    Everything is a tensor, so that one compiled program or CUDA graph serves all lengths. The filling has the last
    clip's modulation and context; its tokens are finite and no gradient reaches them, so they add zeros to every sum.

    frame_K      place of a token's frame among the B * T flattened ones; 0 for other tokens
    slot_K       which memory token it is; 0 for other tokens
    is_frame_K   bool; whether it is a frame of a clip
    target_K     where its velocity goes among B * T places; B * T for memory tokens and the filling
    position_K   rotary position
    clip_K       its clip
    start_S      int32 (B + 2): first token of every clip and of the filling, and K
    """

    frame_K: Tensor
    slot_K: Tensor
    is_frame_K: Tensor
    target_K: Tensor
    position_K: Tensor
    clip_K: Tensor
    start_S: Tensor

    @classmethod
    def of(cls, packing: Packing, memory: int, frames: int, tokens: int) -> FilledPacking:
        """On the CPU. frames: of the padded batch, at least the packing's; tokens: to fill up to, at least its own."""
        clips = len(packing.lengths)
        counts = [memory + length for length in packing.lengths]
        missing = tokens - sum(counts)
        assert missing >= 0
        assert frames >= packing.frames
        slots = torch.arange(memory)
        clip_of_frame, position = packing.frame_F // packing.frames, packing.frame_F % packing.frames
        place_F = clip_of_frame * frames + position
        frame, slot, target, positions = [], [], [], []
        nothing = torch.zeros(memory, dtype=torch.int64)
        for place, where in zip(place_F.split(packing.lengths), position.split(packing.lengths), strict=True):
            frame += [nothing, place]
            slot += [slots, torch.zeros_like(place)]
            target += [torch.full_like(slots, clips * frames), place]
            positions += [slots, where + memory]
        rest = torch.zeros(missing, dtype=torch.int64)
        target_K = torch.cat([*target, rest + clips * frames])
        return cls(
            frame_K=torch.cat([*frame, rest]),
            slot_K=torch.cat([*slot, rest]),
            is_frame_K=target_K < clips * frames,
            target_K=target_K,
            position_K=torch.cat([*positions, rest]),
            clip_K=torch.repeat_interleave(torch.arange(clips), torch.tensor([*counts[:-1], counts[-1] + missing])),
            start_S=torch.tensor([0, *counts, missing]).cumsum(0).to(torch.int32),
        )

    def _each(self, change) -> FilledPacking:
        return FilledPacking(**{name: change(value) for name, value in vars(self).items()})

    def to(self, device: torch.device, non_blocking: bool = False) -> FilledPacking:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> FilledPacking:
        return self._each(lambda value: value.pin_memory())

    def clone(self) -> FilledPacking:
        return self._each(lambda value: value.clone())
