"""The mean gradient over data parallel ranks, reduced in buckets during the backward pass."""

import functools

import torch
import torch.distributed as dist

from sa3dist.parallel.flat_adamw import FlatGradients
from sa3dist.runtime.process_group import Group

# 16 MiB of float32: large enough for full speed on any link, small enough to begin early in the backward pass.
BUCKET_ELEMENTS = 1 << 22


class GradientReduction:
    """Averages the gradient of a ``FlatGradients`` in place, with the same all-reduces in the same order on every rank.

    Buckets are spans of the buffer, counted from its end: the layers there come first in the backward pass. A bucket is
    sent once it and those before it are complete; ``finish`` sends the rest together with the scalars. The moment of
    sending changes no bit.
    """

    def __init__(self, flat: FlatGradients, group: Group, compression: str, bucket_elements: int = BUCKET_ELEMENTS):
        """compression: "none", or "bf16": gradients, but never scalars, are sent and summed in bfloat16"""
        self.flat = flat
        self.group = group
        self.compressed = compression == "bf16"
        self.buckets: list[slice] = []
        self._sizes: list[int] = []
        self._cut(bucket_elements)
        self.reset()

    def _cut(self, bucket_elements: int) -> None:
        """Fill ``buckets`` with spans of the gradient, last one first; what remains below them is the rest."""
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
        """Begin the step's last backward pass: a leaf's gradient is complete once this pass has added to it."""
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
        """Mean of gradients and sum of scalars over all ranks, in place; also on a rank whose backward pass failed."""
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
