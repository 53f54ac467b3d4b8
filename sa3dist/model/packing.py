"""Index tables of the frames that are computed of a padded batch, made on the host.

Legend: B clips, T frames of the padded batch, F valid frames of all clips, K tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self


class TensorFields:
    """A dataclass whose tensors move together, including those of fields that are TensorFields."""

    def _each(self, change: Callable[[Any], Any]) -> Self:
        fields = {name: value for name, value in vars(self).items() if isinstance(value, Tensor | TensorFields)}
        return dataclasses.replace(self, **{name: change(value) for name, value in fields.items()})

    def to(self, device: torch.device, non_blocking: bool = True) -> Self:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._each(lambda value: value.pin_memory())

    def clone(self) -> Self:
        return self._each(lambda value: value.clone())


@dataclasses.dataclass(frozen=True)
class Packing(TensorFields):
    """The valid frames of a padded batch, clip after clip.

    Made by the loader's workers. Lengths are host numbers, so that no device has to be asked.

    frames    frames of the padded batch
    lengths   valid frames of every clip
    frame_F   indices of the valid frames among the B * T flattened ones, int64
    """

    frames: int
    lengths: tuple[int, ...]
    frame_F: Tensor

    @classmethod
    def of(cls, valid_BT: Tensor) -> Packing:
        """The packing of a mask on the CPU, True = valid; valid frames may be anywhere, not only leading."""
        return cls(valid_BT.shape[1], tuple(valid_BT.sum(1).tolist()), valid_BT.flatten().nonzero().squeeze(1))


@dataclasses.dataclass(frozen=True)
class FilledPacking(TensorFields):
    """Clips packed into one list with a given number of tokens; an extra clip, the filling, fills the rest.

    The filling attends only to itself and enters no loss. Everything is a tensor, so that one compiled program or CUDA
    graph serves all lengths. The filling uses the last clip's modulation and context; its tokens are finite and no
    gradient reaches them, so they add zeros to every sum.

    table_5K   int64, per token: index of its frame among the B * T flattened ones (0 if none); number of its memory
               token (0 if none); index of its velocity among the flattened frames (B * T if it is no clip's frame);
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
        outside, filling = len(lengths) * frames, torch.zeros(5, missing, dtype=torch.int64)
        parts = []
        for clip, count in enumerate(counts):
            part = torch.zeros(5, count, dtype=torch.int64)
            frame_T = torch.arange(clip * frames, clip * frames + lengths[clip])
            part[0, memory:], part[2, memory:] = frame_T, frame_T
            part[1, :memory], part[2, :memory] = torch.arange(memory), outside
            part[3], part[4] = torch.arange(count), clip
            parts.append(part)
        filling[2], filling[4] = outside, len(lengths) - 1
        # One clip alone is a shape of its own: its attention need not look up where it ends.
        spans = [*counts, missing] if missing or len(counts) > 1 else counts
        starts = torch.tensor([0, *spans]).cumsum(0).to(torch.int32)
        return cls(torch.cat([*parts, filling], dim=1), starts)
