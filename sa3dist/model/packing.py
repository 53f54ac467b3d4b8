"""Which frames of a padded batch are computed, worked out on the host.

Legend: B clips, T frames of the padded batch, F valid frames of all clips.
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
