"""The mean gradient over data parallel ranks: its buckets travel while the backward pass goes on, in 32 or 16 bits."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from sa3dist.parallel.flat_adamw import FlatAdapters
from sa3dist.runtime.process_group import Group

# 16 MiB of float32: long enough for full speed on any link, short enough to begin early in the backward pass.
BUCKET_ELEMENTS = 1 << 22


class GradientReduction:
    """Averages a ``FlatAdapters``' gradient in place, the same buckets in the same order on every rank.

    Buckets are cut from the buffer's end, where the layers are that the backward pass meets first. A bucket leaves as
    soon as it and those before it are complete; the rest, and the scalars, leave together in ``finish``. When and
    whether a bucket leaves early changes no bit.
    """

    def __init__(self, flat: FlatAdapters, group: Group, compression: str, bucket_elements: int = BUCKET_ELEMENTS):
        """compression   "none", or "bf16": gradients travel, and are summed, in bfloat16; scalars never are"""
        self.flat = flat
        self.group = group
        self.compressed = compression == "bf16"
        self.buckets: list[slice] = []
        self._sizes: list[int] = []
        self._cut(bucket_elements)
        self.reset()

    def _cut(self, bucket_elements: int) -> None:
        """Fill ``buckets`` with spans of the gradient, last one first; what is left below them is the rest."""
        end = self.rest = self.flat.gradient.numel()
        inside: list[torch.Tensor] = []
        for leaf in reversed(self.flat.leaves):
            self.rest -= leaf.numel()
            inside.append(leaf)
            if end - self.rest >= bucket_elements and self.rest > 0:
                for member in inside:
                    member.register_post_accumulate_grad_hook(functools.partial(self._arrived, len(self.buckets)))
                self.buckets.append(slice(self.rest, end))
                self._sizes.append(len(inside))
                end, inside = self.rest, []
        self.rest = end

    def reset(self) -> None:
        """Begin a step: no bucket has left."""
        self._armed = False
        self._missing = list(self._sizes)
        self._travelling: list[tuple[slice, torch.Tensor, dist.Work]] = []

    def arm(self) -> None:
        """The backward pass from here on is the step's last: its gradients are complete as they arrive."""
        self._armed = self.group.world_size > 1

    def _arrived(self, bucket: int, leaf: torch.Tensor) -> None:
        if self._armed:
            self._missing[bucket] -= 1
            while len(self._travelling) < len(self.buckets) and not self._missing[len(self._travelling)]:
                self._send(self.buckets[len(self._travelling)])

    def _send(self, span: slice) -> None:
        part = self.flat.gradient[span]
        part = part.to(torch.bfloat16) if self.compressed else part
        self._travelling.append((span, part, dist.all_reduce(part, async_op=True)))

    def finish(self) -> None:
        """Mean of the gradients and sum of the scalars over all ranks, in place; a rank may come here at any point."""
        if self.group.world_size == 1:
            return
        for span in self.buckets[len(self._travelling) :]:
            self._send(span)
        if self.compressed:
            self._send(slice(0, self.rest))
            self.group.sum_(self.flat.scalars)
        else:
            self.group.sum_(self.flat.scalars_and_gradient(self.rest))
        for span, part, work in self._travelling:
            work.wait()
            if self.compressed:
                self.flat.gradient[span] = part
        self.flat.gradient.div_(self.group.world_size)
