"""What the ranks sum in a step, how the host reads the sums, and whether the step may be taken."""

from collections.abc import Callable

import torch
from torch import Tensor

from sa3dist.training.loss import BY_TIME, LOSSES

# Summed over the step's micro batches and over the ranks; sent together with the gradients.
SUMS = (*LOSSES, *BY_TIME, "silent_crops", "repeated_clips", "failed", "stop", "saving")


def must_skip(scalars: Tensor, norm: Tensor) -> Tensor:
    """1.0 if any rank failed, or the loss or the norm is not finite, else 0.0: float32 of shape (), equal on all ranks.

    Computed on the device, so that the host does not wait.

    scalars   reduced ``SUMS``        norm   of the mean gradient, of shape ()
    """
    failed, loss = (scalars[SUMS.index(name)] for name in ("failed", "loss"))
    finite = torch.stack([loss, norm]).isfinite().all()
    return ((failed > 0) | ~finite).float()


def start_copy_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start copying ``values`` to the host. The returned function waits for that copy alone, not for later launches."""
    if not values.is_cuda:
        return values.tolist
    held = values.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def read() -> list[float]:
        copied.synchronize()
        return held.tolist()

    return read
