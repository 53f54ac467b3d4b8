"""The host's cost of a step without CUDA graphs: processor milliseconds of one core, measured on a CPU.

    python kernels/benchmarks/host_cost.py

The step is that of ``step_sides``: the medium model's blocks with all layers adapted, at a tiny width; bfloat16 under
autocast, one clip, no given context, formed weights, whole blocks compiled. The host does what it does for a GPU:
Inductor and Triton compile for an H100 and launch through their own code. Only the CUDA driver is a stub built here,
which starts nothing; products of compiled blocks and attention kernels are skipped. So the driver's time is missing,
about 3 us per launch, as is torch's for those products and for device memory.

Sides run in turn in one process; of each the 10th percentile counts. A part's cost is the time a step saves without it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

# As modules: their package has functions of the same names.
import sa3dist_kernels.formed_linear
import sa3dist_kernels.gate_gradient
import sa3dist_kernels.qkv_gradient  # noqa: F401
import step_sides
import torch
import triton
from results_file import environment
from sa3dist_kernels import ADAPTER_TYPES, FormedWeights, formed_linear, gated_formed_linear
from sa3dist_kernels.sums_plan import offsets
from step_sides import Side
from torch._dynamo.device_interface import CpuInterface
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.select_algorithm import extern_kernels
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from sa3dist import adapters
from sa3dist.adapters import formed, layers
from sa3dist.model import token_layout, varlen_attention
from sa3dist.model.compiled import compile_blocks

DEPTH, FRAMES, ROUNDS = 24, 323, 40
H100 = GPUTarget("cuda", 90, 32)
CPU = torch.device("cpu")
# Driver functions whose results are read; all others return 0, success.
ANSWERS = {
    # Large enough for any attribute: shared memory and threads of a block.
    "cuDeviceGetAttribute(int *value, int what, int device)": "*value = 232448;",
    "cuFuncGetAttribute(int *value, int what, void *function)": "*value = what == 0 ? 1024 : 0;",
    "cuCtxGetCurrent(void **made)": "*made = (void *)1;",
    "cuModuleLoadData(void **made, void *image)": "*made = (void *)1;",
    "cuModuleGetFunction(void **made, void *module, char *name)": "*made = (void *)1;",
    "cuPointerGetAttribute(void *value, int what, unsigned long long place)": "*(unsigned long long *)value = place;",
    "cuGetErrorString(int error, char **text)": '*text = "none";',
}


def use_idle_driver(folder: Path) -> None:
    """Build a stub CUDA driver in ``folder`` and make Triton launch through it from now on."""
    names = set(re.findall(r"\bcu[A-Z]\w+", Path(nvidia.__file__).with_name("driver.c").read_text()))
    names |= set(re.findall(r"\bcu[A-Z]\w+", Path(nvidia.__file__).read_text()))
    answers = {signature.partition("(")[0]: (signature, body) for signature, body in ANSWERS.items()}
    source = ["int {} {{ {} return 0; }}".format(*answers.get(name, (f"{name}(void)", ""))) for name in sorted(names)]
    (folder / "driver.c").write_text("\n".join(source))
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    flags = "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"
    subprocess.run([compiler, *flags, "-o", library, folder / "driver.c"], check=True)
    (folder / "libcuda.so").symlink_to(library)
    # Caches of their own: these kernels are for no real device.
    os.environ |= {name: str(folder / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    driver = nvidia.CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_current_target = lambda: H100
    triton.runtime.driver.set_active(driver)


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    """A context in which layers and compiled blocks call Triton as on CUDA, with CPU tensors."""
    checks = [name for name, module in sys.modules.items() if hasattr(module, "check_triton")]
    of_qkv, of_gate = (sys.modules[f"sa3dist_kernels.{name}_gradient"] for name in ("qkv", "gate"))
    with contextlib.ExitStack() as stack:
        for name in checks:
            stack.enter_context(patch(f"{name}.check_triton", lambda value: None))
        for patched in (
            patch.object(step_sides, "ADAPTER_PRODUCTS", "formed"),
            patch.object(formed, "FormedWeights", functools.partial(FormedWeights, impl="triton")),
            patch.object(layers, "formed_linear", functools.partial(formed_linear, impl="triton")),
            patch.object(layers, "gated_formed_linear", functools.partial(gated_formed_linear, impl="triton")),
            patch.object(of_qkv, "qkv_gradient_reference", functools.partial(of_qkv.qkv_gradient, impl="triton")),
            patch.object(of_gate, "gate_gradient_reference", functools.partial(of_gate.gate_gradient, impl="triton")),
            *(patch.object(module, "has_kernel", lambda q: True) for module in (varlen_attention, token_layout)),
            patch.object(varlen_attention, "torch", _with_idle_attention()),
            # No worker processes: they would not have the stub driver.
            torch._inductor.config.patch(cpu_backend="triton", compile_threads=1),
            patch.object(CpuInterface, "raise_if_triton_unavailable", lambda device=None: None),
            patch.object(triton_helpers, "set_driver_to_cpu", lambda: None),
            patch.object(triton_heuristics, "GPUTarget", lambda *_: H100),
        ):
            stack.enter_context(patched)
        yield


class _Changed:
    """A module with some of its members replaced."""

    def __init__(self, module, **members) -> None:
        self._module = module
        vars(self).update(members)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def _with_idle_attention() -> _Changed:
    """torch, with cuDNN's attention replaced by allocations of its results."""

    def forward(q, k, v, *_):
        B, H, K, D = q.shape
        out = q.new_empty(K, B, H, D).permute(1, 2, 0, 3)
        return out, q.new_empty(B, H, K, 1, dtype=torch.float32)

    def backward(grad, q, k, v, *_):
        return tuple(x.new_empty(x.shape[2], *x.shape[:2], x.shape[3]).permute(1, 2, 0, 3) for x in (q, k, v))

    names = "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"
    aten = _Changed(torch.ops.aten, **dict(zip(names, (forward, backward), strict=True)))
    return _Changed(torch, ops=_Changed(torch.ops, aten=aten))


def make_side(name: str, adapter_type: str, depth: int) -> Side:
    """A ``Side``, compiled and warmed up."""
    options = types.SimpleNamespace(
        shape="tiny-medium", depth=depth, adapter_type=adapter_type, rank=16, precision="bf16", compile="off",
        cuda_graphs="off",
    )  # fmt: skip
    side = Side(name, options, CPU)
    if name == "frozen":
        # On a CPU without bfloat16 ``Side`` leaves them attached at strength 0.
        adapters.detach_adapter(side.base)
    compile_blocks(side.base.dit, "inductor")
    side.use(1, FRAMES)
    for _ in range(3):
        side.step()
    return side


def without(side: Side, part: contextlib.AbstractContextManager) -> Callable[[], None]:
    """The side's step inside the patch ``part``."""

    def step() -> None:
        with part:
            side.step()

    return step


def only_allocated(layers, kind, impl="triton") -> list[torch.Tensor]:
    """Replaces ``raw_sums``: allocates its results."""
    sizes = [(len(layer.left_OR), layer.x.shape[1], layer.left_OR.shape[1]) for layer in layers]
    counts = [offsets(kind, *size)[1] for size in sizes]
    return layers[0].x.new_empty(sum(counts), dtype=torch.float32).split(counts)


def measured(steps: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Processor milliseconds of the steps, in turn. Unlike wall time it is little affected by other processes."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            spent[name].append(1e3 * (time.process_time() - begin))
    return spent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter-type", choices=[*ADAPTER_TYPES], default="dora-rows", metavar="TYPE")
    parser.add_argument("--depth", type=int, default=DEPTH, help="blocks; the released number unless said")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        use_idle_driver(Path(folder))
        stack.enter_context(as_on_a_device())
        sides = {name: make_side(name, options.adapter_type, options.depth) for name in ("ours", "frozen")}
        for name in ("mm", "addmm"):
            stack.enter_context(patch.object(extern_kernels, name, lambda *_, **__: None))
        ours = sides["ours"]
        transformer, autotuner = ours.base.dit.transformer, triton_heuristics.CachingAutotuner
        parts = {
            "raw sums": patch.object(sys.modules["sa3dist_kernels.formed_linear"], "raw_sums", only_allocated),
            "launches of compiled blocks": patch.object(autotuner, "run", lambda *_, **__: None),
            "blocks": patch.object(transformer, "run_block", lambda block, h_GNE, *_: h_GNE + 0),
        }
        steps = {name: side.step for name, side in sides.items()}
        spent = measured(
            steps | {f"without {name}": without(ours, part) for name, part in parts.items()}, options.rounds
        )
    # Low quantile: other load only makes a step longer.
    fast = {name: statistics.quantiles(values, n=10)[0] for name, values in spent.items()}
    whole = fast["ours"]
    row = {
        "adapter_type": options.adapter_type,
        "depth": options.depth,
        "ours_ms": whole,
        "frozen_ms": fast["frozen"],
        "over_frozen": whole / fast["frozen"],
        "parts_ms": {name: whole - fast[f"without {name}"] for name in parts},
        "medians_ms": {name: statistics.median(values) for name, values in spent.items()},
    }
    print(json.dumps({"environment": environment(CPU), "row": row}, indent=1))


if __name__ == "__main__":
    main()
