"""Helpers of all Triton kernels: whether one can run, its matrix product, and block sizes of the rank."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

# tl.dot takes no side shorter than this.
LEAST_BLOCK = 16
# A longer rank is walked in steps of this, so that a tile's registers do not grow with it.
LARGEST_RANK_BLOCK = 64
# Bytes. Triton compiles one kernel for memory that begins at a multiple of it, and another for any.
ALIGNMENT = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``acc + left @ right`` in float32. UPCAST: the interpreter would multiply the bits of bfloat16 as integers."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def one_of(tensors, index):
    """The tensor at ``index`` of a tuple of them."""
    found = tensors[0]
    for other in tl.static_range(1, len(tensors)):
        found = tl.where(index == other, tensors[other], found)
    return found


def interpreting() -> bool:
    """Whether the kernels of this process run in Triton's interpreter: decided when they were first imported."""
    return not isinstance(dot, triton.JITFunction)


def check_triton(x: torch.Tensor) -> None:
    """Raises ValueError where no kernel can take ``x``."""
    if x.device.type != "cuda" and not interpreting():
        raise ValueError(
            f"impl='triton' needs a CUDA device, the input is on {x.device}; use impl='auto', or set TRITON_INTERPRET=1"
            " before Python starts to run the kernels in Triton's interpreter"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"the Triton kernels take {', '.join(map(str, DTYPES))}, not {x.dtype}; use impl='torch'")


def launch(kernel, grid: tuple[int, ...], arguments: dict[str, Any], kept: dict | None) -> None:
    """``kernel[grid](**arguments)``, but that the compiled kernel is found once.

    Triton looks for it at every call, by each argument's format, alignment and value: three quarters of what a launch
    costs the host.

    arguments   by the kernel's names, and Triton's options
    kept        compiled kernels of earlier calls whose arguments differed in nothing Triton chooses by: addresses of
                tensors that begin at a multiple of ``ALIGNMENT``, and their values. None: it is to look
    """
    if kept is None or interpreting():
        kernel[grid](**arguments)
        return
    # A compiled kernel is loaded for the device that was the current one.
    place = kernel.__name__, triton.runtime.driver.active.get_current_device()
    run: Callable | None = kept.get(place)
    if run is not None:
        run(*[_addressed(arguments[name]) for name in kernel.arg_names])
        return
    compiled = kernel[grid](**arguments)
    if isinstance(compiled, CompiledKernel):
        kept[place] = compiled[(*grid, 1, 1)[:3]]


def launch_as_before(kernel, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """``launch``, which keeps a compiled kernel for each format, alignment and value of the arguments."""
    chosen_by = (
        (value.dtype, value.data_ptr() % ALIGNMENT) if isinstance(value, torch.Tensor) else value
        for value in arguments.values()
    )
    launch(kernel, grid, arguments, _kept(kernel.__name__, grid, *chosen_by))


@functools.cache
def _kept(*_) -> dict:
    return {}


def _addressed(value: Any) -> Any:
    """Addresses in the place of tensors: the launcher would ask each one for it, and the driver whether it is right."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return tuple(map(_addressed, value)) if isinstance(value, tuple) else value


def dot_precision() -> str:
    """How float32 operands are multiplied: as torch's own products are."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def rank_block(rank: int) -> int:
    return min(LARGEST_RANK_BLOCK, triton.next_power_of_2(max(rank, LEAST_BLOCK)))


def loop_end(count: int):
    """A size a kernel loops to. The interpreter's scalars are arrays, which numpy from 2.4 on takes for no index."""
    return tl.constexpr(count) if interpreting() else count


def sent(values: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor on ``device``; the host goes on while it is copied."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
