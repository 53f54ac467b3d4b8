"""Which frames of a padded batch are computed: index tables, built on the host.

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
    """A dataclass whose tensors, including those of nested TensorFields, move together."""

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
    """The valid frames of a padded batch, clip after clip. Built by the loader's workers.

    Lengths are host numbers, so that no code waits for a device.

    frames    frames of the padded batch
    lengths   valid frames of each clip
    frame_F   indices of the valid frames among the B * T flattened ones, int64
    """

    frames: int
    lengths: tuple[int, ...]
    frame_F: Tensor

    @classmethod
    def of(cls, valid_BT: Tensor) -> Packing:
        """The packing of a mask on the CPU, True = valid. Valid frames may be anywhere."""
        return cls(valid_BT.shape[1], tuple(valid_BT.sum(1).tolist()), valid_BT.flatten().nonzero().squeeze(1))


@dataclasses.dataclass(frozen=True)
class FilledPacking(TensorFields):
    """Clips packed into one list of a fixed number of tokens, filled up by an extra clip, the filling.

    The filling attends only to itself and enters no loss. It uses the last clip's modulation and context. Its tokens
    are finite and get no gradient, so they add zeros to every sum. Everything is a tensor, so that one compiled program
    or CUDA graph serves all lengths.

    table_5K   int64, per token: (0) index of its frame among the B * T flattened ones, else 0; (1) index of its memory
               token, else 0; (2) index of its velocity among the flattened frames, or B * T if it is no clip's frame;
               (3) rotary position; (4) clip
    start_S    int32 (B + 2): first token of each clip and of the filling, then K; (2) for one clip without a filling
    """

    table_5K: Tensor
    start_S: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], memory: int, frames: int, tokens: int) -> FilledPacking:
        """Built on the CPU.

        lengths   valid frames of each clip, the first ones of the padded batch
        memory    memory tokens before each clip's frames
        frames    T, at least the longest clip
        tokens    K, at least the tokens of all clips
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
        # A single clip without a filling is a separate shape: its attention needs no length.
        spans = [*counts, missing] if missing or len(counts) > 1 else counts
        starts = torch.tensor([0, *spans]).cumsum(0).to(torch.int32)
        return cls(torch.cat([*parts, filling], dim=1), starts)
