"""What the ranks add up in a step, how the host reads it, and whether the step may be taken."""

from collections.abc import Callable

import torch
from torch import Tensor

from sa3dist.training.loss import BY_TIME, LOSSES

# Summed over the step's micro batches and over the ranks; they travel with the gradients.
SUMS = (*LOSSES, *BY_TIME, "silent_crops", "repeated_clips", "failed", "stop", "saving")


def spoilt(scalars: Tensor, norm: Tensor) -> Tensor:
    """1 where any rank has failed, or the loss or the norm is not finite, else 0: float32, of shape ().

    Found on the device, without waiting, from what is equal on all ranks.

    scalars   reduced ``SUMS``        norm   of the mean gradient, of shape ()
    """
    failed, loss = (scalars[SUMS.index(name)] for name in ("failed", "loss"))
    finite = torch.stack([loss, norm]).isfinite().all()
    return ((failed > 0) | ~finite).float()


def on_the_way(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy ``values`` to the host. What is returned waits for them, but for nothing that is launched later."""
    if not values.is_cuda:
        return values.tolist
    held = values.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def read() -> list[float]:
        copied.synchronize()
        return held.tolist()

    return read
