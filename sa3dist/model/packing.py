"""Which frames of a padded batch are computed, worked out on the host.

Legend: B clips, T frames of the padded batch, F valid frames of all clips, K tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

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
    """Clips packed into one list of a given number of tokens: one more clip, the filling, makes up what is missing.

    The filling attends only to itself and enters no loss. Everything is a tensor, so that one compiled program or CUDA
    graph serves all lengths. The filling has the last clip's modulation and context; its tokens are finite and no
    gradient reaches them, so they add zeros to every sum.

    table_5K   int64, per token: place of its frame among the B * T flattened ones (0 where it is none); which memory
               token it is (0 where none); place of its velocity among them (B * T where it is no frame of a clip);
               rotary position; clip
    start_S    int32 (B + 2): first token of every clip and of the filling, and K; (2) for one clip without a filling
    """

    table_5K: Tensor
    start_S: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], memory: int, frames: int, tokens: int) -> FilledPacking:
        """On the CPU.

        lengths   frames of every clip, the first of the padded batch's        memory   tokens ahead of every clip's
        frames    T, at least the longest                                      tokens   K, at least all clips' tokens
        """
        counts = [memory + length for length in lengths]
        missing = tokens - sum(counts)
        assert missing >= 0
        assert frames >= max(lengths)
        places, nowhere = len(lengths) * frames, torch.zeros(5, missing, dtype=torch.int64)
        parts = []
        for clip, count in enumerate(counts):
            part = torch.zeros(5, count, dtype=torch.int64)
            frame_T = torch.arange(clip * frames, clip * frames + lengths[clip])
            part[0, memory:], part[2, memory:] = frame_T, frame_T
            part[1, :memory], part[2, :memory] = torch.arange(memory), places
            part[3], part[4] = torch.arange(count), clip
            parts.append(part)
        nowhere[2], nowhere[4] = places, len(lengths) - 1
        # One clip alone is a shape of its own: its attention need not ask where it ends.
        spans = [*counts, missing] if missing or len(counts) > 1 else counts
        starts = torch.tensor([0, *spans]).cumsum(0).to(torch.int32)
        return cls(torch.cat([*parts, nowhere], dim=1), starts)

    def _each(self, change: Callable[[Tensor], Tensor]) -> FilledPacking:
        return FilledPacking(change(self.table_5K), change(self.start_S))

    def to(self, device: torch.device, non_blocking: bool = False) -> FilledPacking:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> FilledPacking:
        return self._each(lambda value: value.pin_memory())

    def clone(self) -> FilledPacking:
        return self._each(lambda value: value.clone())
