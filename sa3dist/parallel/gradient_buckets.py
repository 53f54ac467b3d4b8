"""The mean gradient over data parallel ranks: its buckets are reduced while the backward pass goes on."""

import functools

import torch
import torch.distributed as dist

from sa3dist.parallel.flat_adamw import FlatGradients
from sa3dist.runtime.process_group import Group

# 16 MiB of float32: long enough for full speed on any link, short enough to begin early in the backward pass.
BUCKET_ELEMENTS = 1 << 22


class GradientReduction:
    """Averages a ``FlatGradients``' gradient in place, with the same all-reduces in the same order on every rank.

    Buckets are spans of the buffer, from its end, where the layers are that the backward pass meets first. A bucket is
    sent as soon as it and those before it are complete; the rest is sent with the scalars in ``finish``. When a bucket
    is sent changes no bit.
    """

    def __init__(self, flat: FlatGradients, group: Group, compression: str, bucket_elements: int = BUCKET_ELEMENTS):
        """compression   "none", or "bf16": gradients are sent and summed in bfloat16; scalars never are"""
        self.flat = flat
        self.group = group
        self.compressed = compression == "bf16"
        self.buckets: list[slice] = []
        self._sizes: list[int] = []
        self._cut(bucket_elements)
        self.reset()

    def _cut(self, bucket_elements: int) -> None:
        """Fill ``buckets`` with spans of the gradient, last one first; what is left below them is the rest."""
        end = self.rest = sum(leaf.numel() for leaf in self.flat.leaves)
        inside: list[torch.Tensor] = []
        for leaf in reversed(self.flat.leaves):
            self.rest -= leaf.numel()
            inside.append(leaf)
            if end - self.rest >= bucket_elements and self.rest > 0:
                for member in inside:
                    member.register_post_accumulate_grad_hook(
                        functools.partial(self._gradient_complete, len(self.buckets))
                    )
                self.buckets.append(slice(self.rest, end))
                self._sizes.append(len(inside))
                end, inside = self.rest, []
        self.rest = end

    def reset(self) -> None:
        """Begin a step: no bucket is complete."""
        self._last_backward = False
        self._missing = list(self._sizes)
        self._sent: list[tuple[slice, torch.Tensor, dist.Work]] = []

    def begin_last_backward(self) -> None:
        """From here on a leaf's gradient is complete once the backward pass has added to it: it is the step's last."""
        self._last_backward = self.group.world_size > 1

    def _gradient_complete(self, bucket: int, leaf: torch.Tensor) -> None:
        if self._last_backward:
            self._missing[bucket] -= 1
            while len(self._sent) < len(self.buckets) and not self._missing[len(self._sent)]:
                self._send(self.buckets[len(self._sent)])

    def _send(self, span: slice) -> None:
        part = self.flat.gradient[span]
        part = part.to(torch.bfloat16) if self.compressed else part
        self._sent.append((span, part, dist.all_reduce(part, async_op=True)))

    def finish(self) -> None:
        """Mean of gradients, sum of scalars over all ranks, in place; also on a rank whose backward pass has failed."""
        if self.group.world_size == 1:
            return
        for span in self.buckets[len(self._sent) :]:
            self._send(span)
        if self.compressed:
            self._send(slice(0, self.rest))
            self.group.sum_(self.flat.scalars)
        else:
            self.group.sum_(self.flat.scalars_and_gradient(self.rest))
        for span, part, work in self._sent:
            work.wait()
            if self.compressed:
                self.flat.gradient[span] = part
        self.flat.gradient.div_(self.group.world_size)
