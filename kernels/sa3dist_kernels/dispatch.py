"""Which implementation computes an adapted layer: the Triton kernels or plain torch. Decided once, and said."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "torch", "triton")
# Below compute capability 8.0 a GPU has neither bfloat16 products nor asynchronous copies to shared memory.
LEAST_CAPABILITY = (8, 0)
FORMATS = (torch.float32, torch.float16, torch.bfloat16)


def runs_fused(impl: str, device: torch.device, dtype: torch.dtype, statistic: torch.dtype) -> bool:
    """Whether an input of ``dtype`` on ``device`` goes through the Triton kernels.

    impl   "auto" takes them where they can run, "torch" never; "triton" always, and the kernels raise where they cannot
    """
    if impl != "auto":
        return impl == "triton"
    return statistic == torch.float32 and _auto(device.type, device.index, dtype)


# A constant for the compiler: what torch.compiler.assume_constant_result does, without the seconds its import takes.
runs_fused._dynamo_marked_constant = True


@functools.cache
def _auto(kind: str, index: int | None, dtype: torch.dtype) -> bool:
    obstacle = _obstacle(torch.device(kind, index), dtype)
    name = "torch" if obstacle else "Triton kernels"
    log.info("adapted layers on %s in %s: %s%s", kind, dtype, name, f" ({obstacle})" if obstacle else "")
    return obstacle is None


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve, or None."""
    if device.type != "cuda":
        return "the kernels need a CUDA device"
    if dtype not in FORMATS:
        return f"the kernels do not take {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None
