"""CUDA graphs without a GPU: a recorder that runs functions again, and a check that nothing asks for a value."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostRecorder:
    """Keeps functions and runs them again; results lie in the tensors of the first run, as a graph's do."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def warm_up(self, function):
        return function()

    def record(self, function):
        self.recorded += 1
        results = []

        def replay():
            self.replayed += 1
            found = function()
            if not results:
                results.extend(torch.empty_like(value) for value in found)
            for kept, value in zip(results, found, strict=True):
                kept.copy_(value)
            return tuple(results)

        return replay


class NothingAsked(TorchDispatchMode):
    """Raises where the host would wait for a device's values: a CUDA graph cannot record that."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        assert name not in self.ASKING, f"{name} asks the device"
        return function(*args, **(kwargs or {}))
