"""What an adapted layer's norms come to, kept while its trained tensors stay as they are.

Norms, gains and cross terms depend on the trained tensors alone: the micro batches of an optimiser step, and the blocks
computed again in its backward pass, can share them. Sharing is for a stretch of code that says so by giving the layer a
memo; a change of a trained tensor that reaches torch's version counter within it is noticed all the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch


class NormMemo:
    """The norm state of one layer, found once for equal trained tensors."""

    def __init__(self) -> None:
        self._settings: tuple = ()
        self._trained: tuple[torch.Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._state: Any = None

    def recall(self, settings: tuple, trained: Iterable[torch.Tensor], make: Callable[[], Any]) -> Any:
        """What ``make`` returned when it was last called with these settings and the same, unchanged tensors."""
        trained = tuple(trained)
        versions = tuple(tensor._version for tensor in trained)
        same = len(trained) == len(self._trained) and all(map(operator.is_, trained, self._trained))
        if self._state is None or not same or (settings, versions) != (self._settings, self._versions):
            self._state = make()
            self._settings, self._trained, self._versions = settings, trained, versions
        return self._state
