"""What devices can do: published figures of GPUs, and measurements of this machine, which take a second."""

import dataclasses
import timeit
from collections.abc import Callable

import psutil
import torch
from sa3dist_kernels.frozen_products import product_dtype

from sa3dist.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Device:
    """A device's limits: memory in bytes, dense operations per second by dtype, bytes per second.

    source   of the figures: the manufacturer's page, or "measured here"
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    bytes_per_second: float
    source: str
    on_gpu: bool = True

    @property
    def runs_kernels(self) -> bool:
        """Whether ``auto`` uses the Triton kernels: a GPU with bfloat16 units has everything they need."""
        return self.on_gpu and self.bf16_flops > self.fp32_flops

    def flops_per_second(self, value_bytes: int) -> float:
        return self.bf16_flops if value_bytes == 2 else self.fp32_flops


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
# Name, gigabytes, dense bfloat16 and float32 TFLOP/s (accumulated in float32, without sparsity and TF32), GB/s, source.
_DATASHEETS = (
    ("H200", 141, 989, 67, 4800, f"{_NVIDIA}/h200/"),
    ("H100", 80, 989, 67, 3350, f"{_NVIDIA}/h100/ (SXM)"),
    ("H100-PCIe", 80, 756, 51, 2000, f"{_NVIDIA}/h100/ (PCIe)"),
    ("A100-80", 80, 312, 19.5, 2039, f"{_NVIDIA}/a100/ (SXM, 80 GB)"),
    ("A100-40", 40, 312, 19.5, 1555, f"{_NVIDIA}/a100/ (40 GB)"),
    ("L40S", 48, 362, 91.6, 864, f"{_NVIDIA}/l40s/"),
    ("L4", 24, 121, 30.3, 300, f"{_NVIDIA}/l4/"),
    ("A10", 24, 125, 31.2, 600, f"{_NVIDIA}/products/a10-gpu/"),
    ("RTX-4090", 24, 165.2, 82.6, 1008, _ADA),
    ("RTX-3090", 24, 71, 35.6, 936, _AMPERE),
    # Turing has no bfloat16 units: such products run as float32.
    ("T4", 16, 8.1, 8.1, 320, f"{_NVIDIA}/tesla-t4/"),
)
GPUS = {
    name: Device(name, memory * 1e9, bf16 * 1e12, fp32 * 1e12, bandwidth * 1e9, source)
    for name, memory, bf16, fp32, bandwidth, source in _DATASHEETS
}
THIS = "this"
# Side of measured products, and bytes of measured copies: larger than caches, but short on a CPU. On a GPU they would
# take a thirtieth of a millisecond, no longer than the launch, so larger ones are measured.
SQUARE, COPY_BYTES, REPEATS = 2048, 256 << 20, 5
GPU_SQUARE, GPU_COPY_BYTES = 4 * SQUARE, 8 * COPY_BYTES


def find_device(name: str) -> Device:
    """A GPU of the table by name, with or without dashes; or ``this`` machine, measured.

    Raises ConfigError, listing the names, for an unknown name.
    """
    if name == THIS:
        return this_machine()
    wanted = _plain(name)
    for known, device in GPUS.items():
        if wanted in (_plain(known), _plain(known).removeprefix("rtx"), _plain(known).removesuffix("80") + "80gb"):
            return device
    raise ConfigError(f"--gpu: {name!r} is not in the table; choose {', '.join(GPUS)}, or {THIS}")


def datasheet_of(name: str) -> Device | None:
    """The table's entry for a driver's device name, such as ``NVIDIA H200``; None if there is none."""
    words = set(name.upper().replace("-", " ").split())
    matches = [device for known, device in GPUS.items() if set(known.upper().replace("-", " ").split()) <= words]
    matches += [GPUS["A100-80" if "80GB" in words else "A100-40"]] if "A100" in words else []
    return matches[-1] if matches else None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def this_machine(device: torch.device | None = None) -> Device:
    """A device of this machine, with measured limits: large products and copies, the best of a few.

    device   None: the one training would use
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = {dtype: _product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = "this CPU", free_bytes(device)
        if product_dtype(torch.bfloat16, device) == torch.float32:
            flops[torch.bfloat16] = flops[torch.float32]
    rate = _copy_rate(device)
    return Device(
        name, memory, flops[torch.bfloat16], flops[torch.float32], rate, "measured here", device.type == "cuda"
    )


def free_bytes(device: torch.device) -> int:
    """Bytes this process can still allocate on the device: free memory, and unused memory in torch's pool."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    # Small for bfloat16: a CPU that emulates it would take minutes.
    cpu_side = SQUARE if dtype == torch.float32 else SQUARE // 8
    side = GPU_SQUARE if device.type == "cuda" else cpu_side
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: one @ other, device)


def _copy_rate(device: torch.device) -> float:
    size_bytes = GPU_COPY_BYTES if device.type == "cuda" else COPY_BYTES
    source = torch.zeros(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    def run_and_wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(run_and_wait, number=1, repeat=REPEATS + 1))
