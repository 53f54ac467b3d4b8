"""Tries a kernel before it is relied on: does it run on a device, and does it agree with torch?"""

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from sa3dist_kernels.gate_gradient import gate_gradient, gate_gradient_reference
from torch import Tensor

log = logging.getLogger(__name__)

# Largest relative L2 error of a kernel against torch: a few roundings of the dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def agrees(what: str, kernel: Callable[[], Sequence[Tensor]], reference: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether ``kernel`` runs and gives what ``reference`` does; if not, the reason is logged, naming ``what``."""
    try:
        pairs = list(zip(kernel(), reference(), strict=True))
        errors = [float((actual.float() - exact.float()).norm() / exact.float().norm()) for actual, exact in pairs]
    except Exception as problem:
        # Whatever a compiler or driver raises: the compiler's own kernels take over.
        log.warning("%s: our kernel failed, the compiler's are used: %s", what, problem)
        return False
    # Not "error > limit", which is false for NaN.
    if not all(error <= TOLERANCES[exact.dtype] for error, (_, exact) in zip(errors, pairs, strict=True)):
        log.warning("%s: our kernel is %.1e from torch, the compiler's are used", what, max(errors))
        return False
    return True


@functools.cache
def gate_kernel_works(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether ``gate_gradient`` agrees with torch for this number of gated channels; if not, the reason is logged.

    True on a CPU, where torch computes it. The kernel compiled here is the one that passes use.
    """
    if device.type == "cpu":
        return True
    draw = torch.Generator().manual_seed(0)
    shapes = (19, channels), (19, 2 * channels), (2 * channels,)
    operands = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    return agrees(
        "gradients of gates",
        lambda: gate_gradient(*operands, values=True),
        lambda: gate_gradient_reference(*operands, values=True),
    )
