"""A cache of one layer's norms, valid while its trained tensors stay as they are.

Norms, gains and cross terms depend on the trained tensors alone: the micro batches of an optimiser step, and the blocks
recomputed in its backward pass, share them. A caller that knows how long the tensors stay the same hands the layer a
cache for that time. Changes that reach torch's version counter are noticed anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch


class NormCache:
    """The last result of one layer, with the settings and tensors it was computed from."""

    def __init__(self) -> None:
        self._settings: tuple = ()
        self._trained: tuple[torch.Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._result: Any = None

    def get_or_compute(self, settings: tuple, trained: Iterable[torch.Tensor], compute: Callable[[], Any]) -> Any:
        """The result of the last ``compute`` if it was called for these settings and the same, unchanged tensors."""
        trained = tuple(trained)
        versions = tuple(tensor._version for tensor in trained)
        same = len(trained) == len(self._trained) and all(map(operator.is_, trained, self._trained))
        if self._result is None or not same or (settings, versions) != (self._settings, self._versions):
            self._result = compute()
            self._settings, self._trained, self._versions = settings, trained, versions
        return self._result
