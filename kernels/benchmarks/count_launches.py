"""Counts the kernels that a training step launches, without a device: of the frozen model, and of every adapter type.

    python kernels/benchmarks/count_launches.py --json kernels/benchmarks/results/launches.json

The step is that of ``step_sides``: the medium model's blocks with all layers adapted, narrowed, since counts do not
depend on widths; bfloat16 under autocast, one clip, no given context, formed weights, whole blocks compiled. Counted:

* in a compiled block, every kernel that Inductor's scheduler fused for a CPU, and every external call (a product or
  attention). Loops that a CPU only runs inside a common outer loop count separately.
* every launch of a Triton kernel (``form``, ``finish``, raw sums), which is recorded and not run.
* every other torch operation that is neither a view nor an allocation.

A device may launch more: attention's backward pass is one call here and several kernels there.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import functools
import json
import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

# Triton reads this when first imported. Only its interpreter runs without a device.
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import step_sides
import torch
import triton
from results_file import environment
from sa3dist_kernels import ADAPTER_TYPES, FormedWeights, formed_linear, gated_formed_linear
from sa3dist_kernels.joined_sums import JOINED, SINGLE, JoinedSums
from sa3dist_kernels.joined_token_sums import TOKEN_SUMS
from sa3dist_kernels.raw_sums import LayerPass, raw_sums
from sa3dist_kernels.token_sums import TokenSum, token_sums
from sa3dist_kernels.triton_support import interpreting
from step_sides import Side
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sa3dist import adapters
from sa3dist.adapters import adapted_layers, formed, layers
from sa3dist.model import token_layout
from sa3dist.model.compiled import compile_blocks

# Blocks of the medium model.
DEPTH = 24
# Latent frames of a clip: few, and so many that raw sums are split over programs.
FRAMES = (323, 1020)
# Limits: launches of a step beyond the frozen model's, and launches of a frozen block, forward and backward.
PER_LAYER, PER_STEP, PER_FROZEN_BLOCK = 5, 100, 95

# Operations that are not views and still launch nothing: they allocate, or only run on the host.
NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "detach",
    "alias", "is_same_size", "promote_types",
}  # fmt: skip
PARTS = ("forward", "backward", "triton", "torch")
# Operators of several kernels: here queries and keys, attention's gradient, and ``qkv_gradient``.
CALLS = {torch.ops.sa3dist.self_attention_gradient.default: 3}


class _Planned(Exception):
    """Raised to end a compilation once its kernels are known."""


class LaunchCounter(TorchDispatchMode):
    """Counts kernels by their source (``PARTS``), and how often a compiled block ran each way.

    "forward", "backward"   of compiled blocks, except for sums over tokens
    "triton"                launches of Triton kernels
    "torch"                 torch operations outside of blocks, or in the operators of the sums
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.programs = 0
        self._in_block = False

    def backend(self, graph, examples, **_) -> Callable:
        """For torch.compile: runs Inductor up to its plan of kernels; the graph itself then runs uncompiled."""
        return compile_fx(graph, examples, inner_compile=self._compile)

    def _compile(self, graph, examples, is_backward: bool = False, **options) -> Callable:
        self.programs += 1
        run, kernels = copy.deepcopy(graph), []
        # The same pass as in the compilation below.
        JoinedSums("triton")(run.graph)
        run.recompile()

        def note(nodes: list[BaseSchedulerNode]) -> None:
            kernels.append(sum(launches(node) for node in nodes))
            raise _Planned

        changes = {
            "_post_fusion_custom_pass": note,
            "post_grad_custom_pre_pass": JoinedSums("triton"),
            "fx_graph_cache": False,
        }
        try:
            with torch._inductor.config.patch(changes):
                compile_fx_inner(graph, examples, is_backward=is_backward, **options)
        except InductorError:
            # How Inductor passes on ``_Planned``. Without a plan it is another error.
            if not kernels:
                raise
        (planned_kernels,) = kernels
        way = "backward" if is_backward else "forward"

        def counted(*arguments):
            self.counts[way] += planned_kernels
            self.counts[f"{way} passes"] += 1
            before, self._in_block = self._in_block, True
            try:
                return run.forward(*arguments)
            finally:
                self._in_block = before

        return make_boxed_func(counted)

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._in_block:
            if launches_something(function):
                self.counts["torch"] += 1
            return function(*args, **kwargs)
        if function is SINGLE:
            return self._count_inside(_raw_sums, [LayerPass(*args[:6])], *args[6:])[0]
        if function is JOINED:
            none = [None] * len(args[0])
            layers = [LayerPass(*of_layer) for of_layer in zip(*(values or none for values in args[:6]), strict=True)]
            return self._count_inside(_raw_sums, layers, *args[6:])
        if function is TOKEN_SUMS:
            *of_each, owner_BK, impl = args
            return self._count_inside(
                token_sums, [TokenSum(*each) for each in zip(*of_each, strict=True)], owner_BK, impl
            )
        return function(*args, **kwargs)

    def _count_inside(self, function: Callable, *args) -> list[torch.Tensor]:
        """Run an opaque operator so that its launches are counted."""
        self._in_block = False
        try:
            with self:
                return function(*args)
        finally:
            self._in_block = True

    def of(self, call: Callable) -> collections.Counter[str]:
        """The launches of ``call``."""
        self.counts = collections.Counter()
        with self:
            call()
        return self.counts

    @contextlib.contextmanager
    def noting_triton(self) -> Iterator[None]:
        """A context in which launches of Triton kernels are counted instead of run."""

        def launch(*_, **__) -> None:
            self.counts["triton"] += 1

        with patch.object(triton.runtime.interpreter.GridExecutor, "__call__", launch):
            yield


def _raw_sums(layers: list[LayerPass], kind_name: str, impl: str) -> list[torch.Tensor]:
    return raw_sums(layers, ADAPTER_TYPES[kind_name], impl=impl)


def launches_something(function: torch._ops.OpOverload) -> bool:
    named = function.overloadpacket.__name__
    return not (function.is_view or function.namespace == "profiler" or named in NO_LAUNCH)


def launches(node: BaseSchedulerNode) -> int:
    """Kernels of one node of Inductor's plan."""
    if isinstance(node, NopKernelSchedulerNode):
        return 0
    if isinstance(node, ExternKernelSchedulerNode):
        # Zero for selecting one of several results, and for what ``LaunchCounter`` counts itself.
        operation = getattr(node.node, "op_overload", None)
        apart = isinstance(node.node, ir.MultiOutput) or operation in (SINGLE, JOINED, TOKEN_SUMS)
        return 0 if apart else CALLS.get(operation, 1)
    parts = getattr(node, "get_outer_nodes", None)
    return len(parts()) if parts else 1


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    """A context in which layers use formed weights and Triton, as ``auto`` chooses on CUDA."""
    if not interpreting():
        raise RuntimeError("set TRITON_INTERPRET=1 before Python starts: launches are counted in Triton's interpreter")
    with (
        patch.object(step_sides, "ADAPTER_PRODUCTS", "formed"),
        patch.object(formed, "FormedWeights", functools.partial(FormedWeights, impl="triton")),
        patch.object(layers, "formed_linear", functools.partial(formed_linear, impl="triton")),
        patch.object(layers, "gated_formed_linear", functools.partial(gated_formed_linear, impl="triton")),
        patch.object(token_layout, "has_kernel", lambda q: True),
    ):
        yield


def counted_step(name: str, adapter_type: str, frames: tuple[int, ...] = FRAMES, depth: int = DEPTH) -> list[dict]:
    """The launches of one step, a row per length.

    name   "ours" or "frozen", as in ``step_sides``
    Raises RuntimeError if Triton is not in interpreter mode, or a block does not run as one compiled program.
    """
    options = types.SimpleNamespace(
        shape="tiny-medium", depth=depth, adapter_type=adapter_type, rank=4, precision="bf16", compile="off",
        cuda_graphs="off",
    )  # fmt: skip
    counter, counts = LaunchCounter(), []
    torch._dynamo.reset()
    with as_on_a_device(), counter.noting_triton(), torch._functorch.config.patch(enable_autograd_cache=False):
        side = Side(name, options, torch.device("cpu"))
        adapted = len(adapted_layers(side.base))
        if name == "frozen":
            # On a CPU without bfloat16 ``Side`` leaves them attached at strength 0.
            adapters.detach_adapter(side.base)
        compile_blocks(side.base.dit, counter.backend)
        compiled = side.base.dit.transformer.run_block

        def run_block(*arguments):
            # The look-up of a compiled block must not run under the counting mode.
            with _disable_current_modes():
                return compiled(*arguments)

        side.base.dit.transformer.run_block = run_block
        side.use(1, frames[0])
        # Compiles, and allocates AdamW's moments.
        side.step()
        for length in frames:
            side.use(1, length)
            programs = counter.programs
            # As in a captured pass.
            passes = functools.partial(side.passes, side.add_gradients)
            parts = {part: counter.of(call) for part, call in (("begin", side.zero), ("passes", passes))}
            parts["end"] = counter.of(side.update)
            if counter.programs != programs:
                raise RuntimeError("a step compiled again while it was counted")
            counts.append(row_of(parts, length, depth) | {"adapted_layers": adapted})
    torch._dynamo.reset()
    return counts


def row_of(parts: dict[str, collections.Counter], frames: int, depth: int) -> dict:
    passes = parts["passes"]
    if not passes["forward passes"] == passes["backward passes"] == depth:
        raise RuntimeError(f"{depth} blocks did not all run as one compiled program each way: {dict(passes)}")
    totals = {part: sum(counts[name] for name in PARTS) for part, counts in parts.items()}
    return {
        "depth": depth,
        "frames": frames,
        "block_forward": passes["forward"] / depth,
        "block_backward": passes["backward"] / depth,
        "passes": totals["passes"],
        "once_per_step": totals["begin"] + totals["end"],
        "total": sum(totals.values()),
    }


def most(frozen: dict, row: dict) -> int:
    """The limit for ``row``, given the frozen step ``frozen``."""
    return frozen["total"] + PER_LAYER * row["adapted_layers"] + PER_STEP


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=DEPTH, help="blocks; the released number unless said")
    parser.add_argument("--json", type=Path, help="write all counts there")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="types that are counted at a time")
    options = parser.parse_args(arguments)
    # The frozen model has no adapter, so its type does not matter.
    cases = [("frozen", "lora"), *(("ours", kind) for kind in ADAPTER_TYPES)]
    with concurrent.futures.ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(counted_step, *case, depth=options.depth) for case in cases]
        frozen, *others = (future.result() for future in waiting)
    rows = [{"adapter_type": "frozen", **row} for row in frozen]
    within_limits = all(row["block_forward"] + row["block_backward"] <= PER_FROZEN_BLOCK for row in rows)
    for kind, ours in zip(ADAPTER_TYPES, others, strict=True):
        for row, bare in zip(ours, frozen, strict=True):
            rows.append({"adapter_type": kind, **row, "most": most(bare, row)})
            within_limits = within_limits and row["total"] <= most(bare, row)
    for row in rows:
        print(json.dumps(row))
    if options.json:
        content = {"environment": environment(torch.device("cpu")), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("within all limits" if within_limits else "A LIMIT IS EXCEEDED")
    return 0 if within_limits else 1


if __name__ == "__main__":
    sys.exit(main())
