"""Helpers of all Triton kernels: whether they can run, launching them, matrix products and block sizes of the rank."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

# Smallest side of a tl.dot operand.
MIN_DOT_SIDE = 16
# Longer ranks are processed in steps of this size, so that a tile's registers do not grow with the rank.
MAX_RANK_BLOCK = 64
# Of a thread. Given as a limit, it keeps the compiler from spilling a few registers to fit one more program on a
# multiprocessor.
MAX_REGISTERS = 255
# Bytes. Triton specialises a kernel for pointers that are multiples of this.
ALIGNMENT = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``acc + left @ right`` in float32. UPCAST is for the interpreter, which multiplies bfloat16 bits as integers."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def one_of(tensors, index):
    """``tensors[index]`` of a tuple of pointers, for an index known at run time only."""
    selected = tensors[0]
    for other in tl.static_range(1, len(tensors)):
        selected = tl.where(index == other, tensors[other], selected)
    return selected


def interpreting() -> bool:
    """Whether this process runs kernels in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return not isinstance(dot, triton.JITFunction)


def check_triton(x: torch.Tensor) -> None:
    """Raises ValueError if the kernels cannot run on ``x``: its device or dtype."""
    if x.device.type != "cuda" and not interpreting():
        raise ValueError(
            f"impl='triton' needs a CUDA device, the input is on {x.device}; use impl='auto', or set TRITON_INTERPRET=1"
            " before Python starts to run the kernels in Triton's interpreter"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"the Triton kernels take {', '.join(map(str, DTYPES))}, not {x.dtype}; use impl='torch'")


def launch(kernel, grid: tuple[int, ...], arguments: dict[str, Any], cache: dict | None) -> None:
    """``kernel[grid](**arguments)`` with the lookup of the compiled kernel cached.

    Triton looks it up at every call by the dtype, alignment and value of all arguments, which is three quarters of a
    launch's host time.

    arguments   kernel arguments by name, and Triton's launch options
    cache       holds the compiled kernel between calls. The caller passes the same one only for calls that Triton would
                not specialise differently: equal except for the values of tensors and their addresses, which must be
                multiples of ``ALIGNMENT``. None: look up as usual
    """
    if cache is None or interpreting():
        kernel[grid](**arguments)
        return
    # A compiled kernel is loaded on one device.
    key = kernel.__name__, triton.runtime.driver.active.get_current_device()
    run: Callable | None = cache.get(key)
    if run is not None:
        run(*[_as_addresses(arguments[name]) for name in kernel.arg_names])
        return
    compiled = kernel[grid](**arguments)
    if isinstance(compiled, CompiledKernel):
        cache[key] = compiled[(*grid, 1, 1)[:3]]


def launch_cached(kernel, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """``launch`` with one cache per dtype, alignment and value of the arguments."""
    specialised_by = (
        (value.dtype, value.data_ptr() % ALIGNMENT) if isinstance(value, torch.Tensor) else value
        for value in arguments.values()
    )
    launch(kernel, grid, arguments, compiled_cache(kernel.__name__, grid, *specialised_by))


@functools.cache
def compiled_cache(*key) -> dict:
    """A dict for ``launch`` that lives as long as the process, one per key."""
    return {}


def _as_addresses(value: Any) -> Any:
    """Addresses instead of tensors: passed a tensor, the launcher queries it and validates it with the driver."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return tuple(map(_as_addresses, value)) if isinstance(value, tuple) else value


def dot_precision() -> str:
    """``input_precision`` of float32 dots: the same as torch's matmuls."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a program on ``device`` may use; without a GPU, what an H100 has."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def rank_block(rank: int) -> int:
    return min(MAX_RANK_BLOCK, triton.next_power_of_2(max(rank, MIN_DOT_SIDE)))


def loop_end(count: int):
    """A loop bound passed to a kernel. The interpreter makes scalars arrays, which numpy 2.4 rejects as an index."""
    return tl.constexpr(count) if interpreting() else count


def to_device(values: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of ``values`` on ``device``, copied asynchronously."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
