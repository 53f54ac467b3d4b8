"""What the compiler would launch for a block on an H100, planned without one: its kernels, and the bytes each moves.

    python kernels/benchmarks/plan_block.py --frames 4091 --adapter-type dora-rows
    python kernels/benchmarks/plan_block.py --variants        # how many variants of each kernel a device chooses from

Traces one block of the medium model on a CPU, at its real widths, forward and backward; then moves the graphs to a fake
CUDA device and lets Inductor plan for it. Nothing runs. Bytes are counted in widths: one bfloat16 value per token and
channel of the model width.

On CUDA, norms are one torch operation (``_fused_rms_norm``), whose gradient has other steps than those traced here.
With it the kernels, the saved tensors and the matched sums over tokens are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

# Required by count_launches.py, which is imported below.
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import count_launches
import torch
import triton
from sa3dist_kernels import ADAPTER_TYPES
from sa3dist_kernels.joined_sums import JoinedSums
from step_sides import Side
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from sa3dist import adapters
from sa3dist.model.compiled import DETERMINISTIC_OPTIONS, INDUCTOR_OPTIONS, compile_blocks

MEMORY_TOKENS, WIDTH = 64, 1536
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=85017493504, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
)  # fmt: skip


class _Stop(BaseException):
    """Raised to end a compilation once its by-product has been taken."""


class Kernel(NamedTuple):
    """A kernel that Inductor generates.

    source     Triton code, including what defines its variants
    variants   blocks, warps and stages; of several, a device chooses at the first launch
    """

    source: str
    variants: list[tuple]


def traced(
    name: str, adapter_type: str, frames: int, tokens: int | None = None, shape: str = "medium-base"
) -> list[tuple[torch.fx.GraphModule, bool]]:
    """The block's graphs as Inductor gets them, and whether each is the backward one.

    tokens   as for ``compile_blocks``
    """
    options = types.SimpleNamespace(
        shape=shape, depth=1, adapter_type=adapter_type, rank=16, precision="bf16", compile="off", cuda_graphs="off"
    )
    graphs: list[tuple[torch.fx.GraphModule, bool]] = []

    def take(graph, _, is_backward: bool = False, **__):
        graphs.append((copy.deepcopy(graph), is_backward))
        if is_backward:
            raise _Stop
        return graph.forward

    torch._dynamo.reset()
    settings = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with count_launches.as_on_a_device(), torch._functorch.config.patch(settings), contextlib.suppress(_Stop):
        side = Side(name, options, torch.device("cpu"))
        if name == "frozen":
            adapters.detach_adapter(side.base)
        backend = lambda graph, examples: compile_fx(graph, examples, inner_compile=take)  # noqa: E731
        compile_blocks(side.base.dit, backend, tokens=tokens)
        side.use(1, frames)
        side.passes()
    return graphs


def saved_bytes(graph: torch.fx.GraphModule) -> int:
    """Bytes that the forward graph saves for the backward one; its first output is the block's result."""
    values = [node.meta["val"] for node in graph.graph.output_node().args[0][1:] if node.op != "placeholder"]
    values = [value for value in values if isinstance(value, torch.Tensor)]
    # The hint: converting a symbolic length to an int would specialise the graph.
    counts = (count if isinstance(count := value.numel(), int) else count.node.hint for value in values)
    return sum(count * value.itemsize for count, value in zip(counts, values, strict=True))


def on_device(graph: torch.fx.GraphModule) -> list:
    """Change the graph to work on the fake device; returns its inputs there."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    mode = next(node.meta["val"].fake_mode for node in placeholders if isinstance(node.meta["val"], torch.Tensor))
    with mode:
        inputs = [
            torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda:0")
            if isinstance(value := node.meta["val"], torch.Tensor)
            else value
            for node in placeholders
        ]
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    graph.recompile()
    FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*inputs)
    return inputs


@contextlib.contextmanager
def fake_device() -> Iterator[None]:
    """A context in which torch and Inductor see an H100."""
    answers = {
        torch.cuda: {
            "get_device_properties": H100, "is_available": True, "current_device": 0, "device_count": 1,
            "get_device_capability": (9, 0), "is_bf16_supported": True, "_exchange_device": 0,
            "_maybe_exchange_device": 0, "_lazy_init": None, "synchronize": None,
        },
        CudaInterface: {
            "get_device_properties": H100, "get_compute_capability": 90, "current_device": 0, "is_available": True,
            "is_triton_capable": True, "raise_if_triton_unavailable": None,
        },
        CudaInterface.Worker: {"get_device_properties": H100, "current_device": 0},
        torch._inductor.scheduler: {"has_triton": True},
        torch.utils._triton: {"has_triton": True, "triton_hash_with_backend": ""},
        triton_helpers: {"set_driver_to_gpu": None},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch._dynamo.utils, "preserve_rng_state", contextlib.nullcontext))
        for owner, members in answers.items():
            for name, answer in members.items():
                give = lambda *_, answer=answer, **__: answer  # noqa: E731
                stack.enter_context(patch.object(owner, name, staticmethod(give) if isinstance(owner, type) else give))
        yield


def planned(graph: torch.fx.GraphModule, is_backward: bool) -> list[tuple[str, bool, int]]:
    """(name, whether Inductor generates it, bytes read and written) of each kernel."""
    kernels = []

    def note(nodes: list[BaseSchedulerNode]) -> None:
        kernels.extend(map(described, nodes))
        raise _Stop

    _lowered(graph, is_backward, {"_post_fusion_custom_pass": note})
    if not kernels:
        raise RuntimeError("Inductor did not plan the graph")
    return [kernel for kernel in kernels if kernel is not None]


def _lowered(graph: torch.fx.GraphModule, is_backward: bool, choices: dict[str, Any]) -> None:
    """Run Inductor on the graph, as far as it gets without a device."""
    inputs = on_device(graph)
    settings = INDUCTOR_OPTIONS | {
        "post_grad_custom_pre_pass": JoinedSums("triton"),
        "fx_graph_cache": False,
        "compile_threads": 1,
    }
    mode = next(value.fake_mode for value in inputs if isinstance(value, torch.Tensor))
    with (
        fake_device(),
        torch._inductor.config.patch(settings | choices),
        tracing(TracingContext(mode)),
        contextlib.suppress(_Stop, InductorError),
    ):
        compile_fx_inner(graph, inputs, is_backward=is_backward)


def generated(graph: torch.fx.GraphModule, is_backward: bool, exact: bool) -> list[Kernel]:
    """The kernels that Inductor generates; exact: for a deterministic run."""
    programs = []

    def note(_, program) -> None:
        programs.append(program.value)
        raise _Stop

    with patch.object(GraphLowering, "_compile_to_module_lines", note):
        _lowered(graph, is_backward, DETERMINISTIC_OPTIONS if exact else {})
    if not programs:
        raise RuntimeError("Inductor did not generate the graph's kernels")
    sources = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", programs[0], re.DOTALL)
    return [Kernel(source, _variants(source)) for source in sources]


def _variants(source: str) -> list[tuple]:
    variants = []

    def note(_, configs, **__) -> Callable:
        variants.extend(map(triton_heuristics.triton_config_to_hashable, triton_heuristics.unique_configs(configs)))
        return lambda kernel: kernel

    with (
        fake_device(),
        patch.object(triton_heuristics, "cached_autotune", note),
        patch.object(triton, "jit", lambda function: function),
    ):
        exec(source, {"__file__": ""})
    return variants


def described(node: BaseSchedulerNode) -> tuple[str, bool, int] | None:
    # Selecting one of several results is not a kernel.
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return None
    parts = getattr(node, "snodes", [node])
    if isinstance(node, ExternKernelSchedulerNode):
        name = str(getattr(node.node, "op_overload", None) or node.node.python_kernel_name)
    else:
        origins = sorted({origin.name for part in parts for origin in part.node.get_origins()})
        name = ", ".join(origins)
    return name, not isinstance(node, ExternKernelSchedulerNode), int(node.get_read_write_buffers_sizes())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4091)
    parser.add_argument("--adapter-type", choices=["frozen", *ADAPTER_TYPES], default="dora-rows", metavar="TYPE")
    parser.add_argument("--variants", action="store_true", help="how many variants of each kernel there are, no bytes")
    options = parser.parse_args(arguments)
    frozen = options.adapter_type == "frozen"
    graphs = traced("frozen" if frozen else "ours", "lora" if frozen else options.adapter_type, options.frames)
    if options.variants:
        for exact in (False, True):
            counts = [len(kernel.variants) for graph in copy.deepcopy(graphs) for kernel in generated(*graph, exact)]
            print(f"{'deterministic' if exact else 'otherwise'}: {len(counts)} kernels, of variants: {counts}")
        return 0
    width = (options.frames + MEMORY_TOKENS) * WIDTH * torch.bfloat16.itemsize
    totals = {"forward": 0.0, "backward": 0.0}
    for graph, is_backward in graphs:
        way = "backward" if is_backward else "forward"
        for name, own, moved in planned(graph, is_backward):
            print(f"{way:9}{moved / width:8.2f} {'own ' if own else '    '} {name[:160]}")
            totals[way] += moved / width if own else 0.0
        if not is_backward:
            print(f"widths saved for the backward pass: {saved_bytes(graph) / width:.1f}")
    own = sum(totals.values())
    print(f"widths moved by Inductor's own kernels: {own:.1f}, of them forward {totals['forward']:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
