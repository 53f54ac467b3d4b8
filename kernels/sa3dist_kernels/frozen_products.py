"""Products with a frozen weight, in the dtype the machine multiplies fastest, and the plain frozen layer.

Legend: O fan_out, I fan_in, K any number of rows.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator

import torch

log = logging.getLogger(__name__)

# Weights are converted in blocks of this many elements. Copying 16 MiB of float32 costs about 1 % of its product, and
# larger blocks reach the size at which glibc returns freed memory to the system (measured: 3x the conversion time).
BLOCK_ELEMENTS = 1 << 22
# BLAS is faster for weights with fewer rows, measured with 1 to 3000 tokens.
MIN_ONEDNN_ROWS = 256


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for ``dtype``; logged once if not.

    Without them torch emulates: on AVX2 a bfloat16 ``dY @ W`` is 100 times slower than float32.
    """
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    supported = dtype not in native or native[dtype]()
    if not supported:
        log.info("this CPU has no %s matrix instructions; frozen weights are multiplied in float32", dtype)
    return supported


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which operands of ``dtype`` are multiplied on ``device``."""
    return torch.float32 if device.type == "cpu" and not cpu_multiplies(dtype) else dtype


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a layer's output: autocast's if autocast is on (except for float64), else that of ``x``."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Disable autocast: the ops choose every dtype explicitly, in the backward pass too."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def blocks(weight_OI: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weight in ``dtype`` as blocks of rows: the weight itself, or copies of at most BLOCK_ELEMENTS."""
    if weight_OI.dtype == dtype:
        yield slice(0, weight_OI.shape[0]), weight_OI
    else:
        yield from small_blocks(weight_OI, dtype, BLOCK_ELEMENTS)


def small_blocks(weight_OI: torch.Tensor, dtype: torch.dtype, elements: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Copies of consecutive rows of the weight in ``dtype``, each of at most ``elements`` but at least one row."""
    rows = max(1, elements // weight_OI.shape[1])
    for start in range(0, weight_OI.shape[0], rows):
        span = slice(start, start + rows)
        yield span, weight_OI[span].to(dtype)


def times_transposed(left_KI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """``left @ weight.T`` (K, O) in left's dtype."""
    parts = [_product_transposed(left_KI, block) for _, block in blocks(weight_OI, left_KI.dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _product_transposed(left_KI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Uses oneDNN for float32 on a CPU: 0.55 to 0.9 times the time of BLAS, torch's choice, for this weight layout."""
    if (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype == torch.float32
        and weight_OI.shape[0] >= MIN_ONEDNN_ROWS
        and torch.backends.mkldnn.is_available()
    ):
        return torch.ops.mkldnn._linear_pointwise(left_KI, weight_OI, None, "none", [], "")
    return left_KI @ weight_OI.t()


def times(left_KO: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """``left @ weight`` (K, I) in left's dtype."""
    if weight_OI.dtype == left_KO.dtype:
        return left_KO @ weight_OI
    out = left_KO.new_zeros(left_KO.shape[0], weight_OI.shape[1])
    for span, block in blocks(weight_OI, left_KO.dtype):
        out.addmm_(left_KO[:, span], block)
    return out


def weight_times(weight_OI: torch.Tensor, right_IK: torch.Tensor) -> torch.Tensor:
    """``weight @ right`` (O, K) in right's dtype. For small K twice as fast as the transposed product."""
    out = right_IK.new_empty(weight_OI.shape[0], right_IK.shape[1])
    for span, block in blocks(weight_OI, right_IK.dtype):
        torch.mm(block, right_IK, out=out[span])
    return out


class _FrozenLinear(torch.autograd.Function):
    """Linear layer whose weight never gets a gradient."""

    @staticmethod
    def forward(ctx, x, weight_OI, bias_O, dtype):
        ctx.save_for_backward(weight_OI)
        ctx.dtype, ctx.x_dtype = dtype, x.dtype
        with no_autocast(x.device):
            out = times_transposed(x.reshape(-1, x.shape[-1]).to(product_dtype(dtype, x.device)), weight_OI)
            if bias_O is not None:
                out += bias_O
            return out.to(dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight_OI,) = ctx.saved_tensors
        with no_autocast(grad.device):
            rows = grad.reshape(-1, grad.shape[-1]).to(product_dtype(ctx.dtype, grad.device))
            return times(rows, weight_OI).to(ctx.x_dtype).view(*grad.shape[:-1], -1), None, None, None


def frozen_linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear`` of a frozen layer: gradients reach x only, and a CPU without 16-bit instructions uses float32.

    x  (..., I), any float dtype; the output (..., O) has autocast's dtype where autocast is on, else x's.
    """
    return _FrozenLinear.apply(x, weight_OI, bias_O, compute_dtype(x))
