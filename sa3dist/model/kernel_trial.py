"""A trial of a kernel of our own before it is relied on: whether it runs on a device and agrees with plain torch."""

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from sa3dist_kernels.gate_gradient import gate_gradient, gate_gradient_reference
from torch import Tensor

log = logging.getLogger(__name__)

# How far a kernel may be from plain torch, relative L2: some roundings of either format.
LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def agrees(what: str, ours: Callable[[], Sequence[Tensor]], torchs: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether ``ours`` gives what ``torchs`` does, in formats of ``LIMITS``; if not, the log says of ``what`` why."""
    try:
        pairs = list(zip(ours(), torchs(), strict=True))
        errors = [float((found.float() - wanted.float()).norm() / wanted.float().norm()) for found, wanted in pairs]
    except Exception as problem:
        # Whatever a compiler or driver raises: the compiler's own kernels do the same.
        log.warning("%s: by the compiler's kernels, because ours failed: %s", what, problem)
        return False
    # Not "error > limit": that is false for a NaN.
    if not all(error <= LIMITS[wanted.dtype] for error, (_, wanted) in zip(errors, pairs, strict=True)):
        log.warning("%s: by the compiler's kernels; ours are %.1e from torch's", what, max(errors))
        return False
    return True


@functools.cache
def gate_kernel_works(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether the kernel of a gate's gradient does, for so many channels of the gated values; if not, the log says why.

    On a CPU it is torch itself. What is compiled for the trial is what a pass takes.
    """
    if device.type == "cpu":
        return True
    draw = torch.Generator().manual_seed(0)
    shapes = (19, channels), (19, 2 * channels), (2 * channels,)
    given = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    return agrees(
        "gradients of gates",
        lambda: gate_gradient(*given, values=True),
        lambda: gate_gradient_reference(*given, values=True),
    )
