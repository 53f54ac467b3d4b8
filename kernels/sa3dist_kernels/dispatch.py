"""Whether the Triton kernels work on a device: decided once per device and format, by computing a small layer."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

from sa3dist_kernels.adapter_types import ADAPTER_TYPES
from sa3dist_kernels.frozen_products import no_autocast

log = logging.getLogger(__name__)

# Formats training takes the kernels in, and how far they may be from plain torch in each (relative L2): a few
# roundings. float16 has too small a range for W' with small gains.
FORMATS = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
# Below compute capability 8.0 a GPU has neither bfloat16 products nor asynchronous copies to shared memory.
LEAST_CAPABILITY = (8, 0)


@functools.cache
def kernels_serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether adapted layers with products in ``dtype`` on ``device`` may be left to the kernels.

    Where nothing speaks against it they compute one small layer first, and are compared with plain torch.
    """
    obstacle = obstacle_to(device, dtype)
    if obstacle is None and (failure := trial(device, dtype)):
        log.warning("adapted layers on %s in %s: torch, because the Triton kernels failed: %s", device, dtype, failure)
        return False
    log.info("adapted layers on %s in %s: %s", device, dtype, f"torch ({obstacle})" if obstacle else "Triton kernels")
    return obstacle is None


def obstacle_to(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve, or None."""
    if device.type != "cuda":
        return "the kernels need a CUDA device"
    if dtype not in FORMATS:
        return f"the kernels do not train in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """What went wrong when the kernels computed a small layer, forward and backward, or None: they agree with torch."""
    name = "dora-rows"
    try:
        with torch.enable_grad(), no_autocast(device):
            ours, theirs = (_small_layer(impl, ADAPTER_TYPES[name], device, dtype) for impl in ("triton", "torch"))
            for key, expected in theirs.items():
                error = float((ours[key].float() - expected.float()).norm() / expected.float().norm())
                # Not "error > limit": that is false for a NaN.
                if not error <= FORMATS[dtype]:
                    return f"{name}: {key} is {error:.1e} from torch's"
    except Exception as problem:
        # Whatever a compiler or driver raises: the run goes on with torch, and the caller logs this.
        return f"{type(problem).__name__}: {problem}"
    return None


def _small_layer(impl: str, kind, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and every gradient of one random layer of odd sizes, the same for equal arguments but ``impl``."""
    from sa3dist_kernels.adapted_linear import adapted_linear

    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(device)

    weight, bias, x, grad = (normal(*shape).to(dtype) for shape in ((37, 26), (37,), (19, 26), (19, 37)))
    params = {name: normal(*shape).requires_grad_() for name, shape in kind.parameter_shapes(37, 26, 3).items()}
    y = adapted_linear(x.requires_grad_(), weight, bias, params, kind, 0.5, impl=impl)
    gradients = torch.autograd.grad(y, [x, *params.values()], grad)
    return {"y": y.detach(), **dict(zip(("gradient of x", *params), gradients, strict=True))}
