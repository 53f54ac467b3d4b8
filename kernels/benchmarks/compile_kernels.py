"""Compiles every Triton kernel for GPUs, without needing one, and checks what the machine code uses.

    python kernels/benchmarks/compile_kernels.py
    python kernels/benchmarks/compile_kernels.py --capability 80 89 --rank 1 17 256 --format fp32 --list

Prints a line per compute capability, format and rank, and a line per fault: a kernel that does not compile, spills
registers with the default tiles, or needs more shared memory than such a GPU has. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from sa3dist_kernels import (
    ADAPTER_TYPES,
    frozen_constants,
    gate_gradient,
    qkv_gradient,
    queries_and_keys,
    sums_kernels,
    token_sums,
)
from sa3dist_kernels.formed_blocks import Tiles, default_tiles
from sa3dist_kernels.formed_group import Group
from sa3dist_kernels.formed_launch import finish_plan, form_plan
from sa3dist_kernels.formed_spec import FormedSpec, product_elements
from sa3dist_kernels.qkv_gradient import BLOCK_H, BLOCK_K
from sa3dist_kernels.sums_plan import LayerShape, plan_of
from sa3dist_kernels.triton_support import dot_precision
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that a program may use, by compute capability.
SHARED_BYTES = {
    80: 163 << 10,  # A100
    86: 99 << 10,  # RTX 30
    89: 99 << 10,  # RTX 40, L40S
    90: 227 << 10,  # H100, H200
    100: 227 << 10,  # B200
    120: 99 << 10,  # RTX 50
}
# Those with code of their own: 8.0, 8.6 and 8.9 have the same instructions.
CAPABILITIES = (89, 90, 120)
# A rank for each kind of code: a step of 16 (partly filled and full), 32 and 64, and several steps.
RANKS = (8, 16, 24, 64, 96, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of the products and of W0, as the settings mixed_precision and base_precision have them.
FORMATS = {
    "bf16": ("bf16", "bf16"),
    "fp32": ("fp32", "fp32"),
    "bf16-of-fp32": ("bf16", "fp32"),
    "bf16-of-fp16": ("bf16", "fp16"),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")
FORMED_TYPES = {"floats": "*fp32", "scales": "*fp32", "layers": "*i64", "programs": "*i32", "span": "i32"}


class Variant(NamedTuple):
    """A kernel with its constants and launch options; ``layers`` is the length of its tuples of tensors."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    layers: int = 1

    @property
    def label(self) -> str:
        return f"{self.kernel.fn.__name__.strip('_')}: {self.name}"


def formed_variants(product: str, weight: str, rank: int) -> Iterator[Variant]:
    """Each distinct launch of FORM and FINISH."""
    for kind in ADAPTER_TYPES.values():
        spec = _spec(kind, DTYPES[weight], rank)
        memory = torch.empty(product_elements([spec]), dtype=DTYPES[product], device="meta")

        def launches(tiles: Tiles, what: str, spec=spec, memory=memory, kind=kind) -> Iterator[Variant]:
            group = Group([spec], memory, tiles)
            for phase, plan in (("form", form_plan(group)), ("finish", finish_plan(group))):
                for launch in plan:
                    variable = {*FORMED_TYPES, "weight", "product"}
                    constants = {key: value for key, value in launch.arguments.items() if key not in variable}
                    yield Variant(f"{phase} {launch.name}{what}, {kind.name}", launch.kernel, constants)

        tiles = default_tiles(rank, memory.dtype)
        yield from launches(tiles, "")
        if tiles.form_resident is not None:
            # Of a layer of another width.
            yield from launches(dataclasses.replace(tiles, form_resident=None), " of another width")
            yield from launches(default_tiles(rank, memory.dtype, rows=1), " of a single layer")


def _spec(kind, weight: torch.dtype, rank: int, side: int = 1536) -> FormedSpec:
    shapes = kind.parameter_shapes(side, side, rank)
    params = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    weight_OI = torch.empty(side, side, dtype=weight, device="meta")
    frozen = frozen_constants(weight_OI, *[torch.empty(side, rank, device="meta")] * 2) if kind.xs else None
    return FormedSpec(weight_OI, params, params, kind, 1.0, frozen)


# A clip of 30 s and one of 380 s; tokens of a prompt.
TOKENS, PROMPT = (387, 4160), 257
# (fan_in, fan_out) in the medium base: single layers, and the layers of a block, which share launches.
LAYERS = ((1536, 12288), (6144, 1536), (1536, 1536), (768, 256), (257, 1536))
BLOCK = ((1536, 7680), (1536, 1536), (1536, 3072), (1536, 1536), (1536, 1536), (1536, 12288), (6144, 1536))


def sums_groups() -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    for tokens in TOKENS:
        for fan_in, fan_out in LAYERS:
            yield f"{tokens} tokens, {fan_in} to {fan_out}", [(tokens, fan_in, fan_out)]
        yield f"{tokens} tokens, a block", [(PROMPT, 1536, 4608), *((tokens, *layer) for layer in BLOCK)]


def sums_variants(dtype: str, rank: int, shared: int) -> Iterator[Variant]:
    """The raw sums, with all blocks and splits that real sizes lead to."""
    for (label, layers), kind in itertools.product(sums_groups(), ADAPTER_TYPES.values()):
        shapes = tuple(LayerShape(n, i, o, i, i * kind.cols, o, o * kind.rows) for n, i, o in layers)
        plan = plan_of(shapes, rank, kind, DTYPES[dtype], dot_precision(), torch.device("cpu"), shared)
        for kernel, launch in (
            (sums_kernels.thin_products_kernel, plan.thin),
            (sums_kernels.raw_sums_kernel, plan.sums),
            (sums_kernels.core_sums_kernel, plan.core),
        ):
            if len(launch.programs):
                yield Variant(f"{label}, {kind.name}", kernel, launch.constants, len(layers))


def qkv_variants() -> Iterator[Variant]:
    """Queries and keys and their gradient: the released models' heads, with and without pairs."""
    for pairs, heads in ((2, 24), (1, 16)):
        constants = {"H": heads, "D": 64, "P": pairs, "HALF": 16, "BLOCK_K": BLOCK_K, "BLOCK_H": BLOCK_H, "BLOCK_D": 64}
        for kernel in (queries_and_keys._queries_and_keys_kernel, qkv_gradient._qkv_gradient_kernel):
            yield Variant(f"{heads} heads, pairs of {pairs}", kernel, constants | {"num_warps": 4})


def gate_variants() -> Iterator[Variant]:
    """The gate's gradient: the released models' feed-forwards, with and without bias and gated values."""
    blocks = {"BLOCK_K": gate_gradient.BLOCK_K, "BLOCK_G": gate_gradient.BLOCK_G, "num_warps": gate_gradient.WARPS}
    for channels, bias, values in itertools.product((6144, 4096), (True, False), (True, False)):
        constants = {"G": channels, "HAS_BIAS": bias, "VALUES": values, **blocks}
        label = f"{channels} channels{', bias' if bias else ''}{', values' if values else ''}"
        yield Variant(label, gate_gradient._gate_gradient_kernel, constants)


def token_sums_variants() -> Iterator[Variant]:
    """The sums of a block's modulations: joined ones, a single one, and of three clips."""
    tiles, E = token_sums.TILES, 1536
    blocks = triton.cdiv(E, tiles.channels)
    for count, clips, rights, rows in ((4, 1, 15, 10), (1, 1, 0, 1), (4, 3, 15, 10)):
        splits = min(token_sums.MAX_SPLITS, tiles.programs // (blocks * count))
        common = {"E": E, "COUNT": count, "SPLITS": splits, "CLIPS": clips}
        steps = {"BLOCK_K": tiles.tokens, "DEPTH": tiles.depth, "BLOCK_E": tiles.channels, "num_warps": tiles.warps}
        constants = common | steps | {"RIGHTS": rights, "ROWS": rows, "OWNED": clips > 1}
        label = f"{count} sums, {clips} clips"
        yield Variant(label, token_sums._partial_sums_kernel, constants, count)
        added = common | {"SCALES": rows, "BIASES": count // 4, "BLOCK_E": token_sums.REDUCE_CHANNELS, "num_warps": 4}
        yield Variant(label, token_sums._reduce_kernel, added, count)


# Arguments of the sums: tuples of one tensor per layer or sum, and single tensors.
OF_LAYERS = ("xs", "dxs", "dys", "zs", "rights", "lefts", "rows", "scales", "biases")
SUMS_TYPES = {"partials": "*fp32", "out": "*fp32", "sizes": "*i64", "programs": "*i32"}
UNALIGNED = ("total", "K", "eps", "span")


def signature(kernel, product: str, weight: str, layers: int) -> dict[str, str | tuple[str, ...]]:
    """Type of every argument."""
    if "floats" in kernel.arg_names:
        others = FORMED_TYPES | {"weight": f"*{weight}"}
        return {name: others.get(name, f"*{product}") for name in kernel.arg_names}
    if "gamma_q" in kernel.arg_names:
        narrow = ("grad_q", "grad_k", "grad_v", "x", "gamma_q", "gamma_k", "out", "out_q", "out_k")
        others = {"cos": "*fp32", "sin": "*fp32", "is_clips": "*i1", "eps": "fp32"}
        others |= dict.fromkeys(narrow, f"*{product}")
        return {name: others.get(name, "i32") for name in kernel.arg_names}
    if "dz" in kernel.arg_names:
        return {name: "i32" if name == "K" else f"*{product}" for name in kernel.arg_names}
    of_layers = dict.fromkeys(OF_LAYERS, (f"*{product}",) * layers)
    others = SUMS_TYPES
    if "owner" in kernel.arg_names or "scales" in kernel.arg_names:
        # In a single sum, rows is a mask.
        of_layers["rows"] = ("*fp32" if layers > 1 else "*i1",) * layers
        others = others | {"out": f"*{product}", "owner": "*i1"}
    return {name: of_layers.get(name) or others.get(name, "i32") for name in kernel.arg_names}


class Usage(NamedTuple):
    """Per thread: registers, bytes spilled to local memory. Per program: bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def compiled(variant: Variant, product: str, weight: str, capability: int) -> Usage:
    kernel, constants = variant.kernel, dict(variant.constants)
    options = {key: constants.pop(key) for key in LAUNCH_OPTIONS if key in constants}
    names, types = kernel.arg_names, signature(kernel, product, weight, variant.layers)
    # As for real sizes: addresses, sizes and strides are multiples of 16.
    aligned = {
        path: [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in constants and name not in UNALIGNED
        for path in ([(place, layer) for layer in range(variant.layers)] if name in OF_LAYERS else [(place,)])
    }
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {key: value for key, value in options.items() if value is not None}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", printed).groups())
    return Usage(registers, spilled, built.metadata.shared)


class Job(NamedTuple):
    """Kernels that are compiled together; rank None: those that no rank enters."""

    capability: int
    format: str
    rank: int | None

    def __str__(self) -> str:
        what = "other kernels" if self.rank is None else f"rank {self.rank}"
        return f"{self.capability // 10}.{self.capability % 10} {self.format:12} {what:13}"


def variants_of(job: Job) -> Iterator[Variant]:
    product, weight = FORMATS[job.format]
    if job.rank is None:
        yield from itertools.chain(qkv_variants(), token_sums_variants(), gate_variants())
        return
    yield from formed_variants(product, weight, job.rank)
    if product == weight:
        yield from sums_variants(product, job.rank, SHARED_BYTES[job.capability])


def distinct(variants: Iterable[Variant]) -> Iterator[Variant]:
    """Without those whose code an earlier one has."""
    seen: list[tuple] = []
    for variant in variants:
        if variant[1:] not in seen:
            seen.append(variant[1:])
            yield variant


def run(job: Job) -> tuple[Job, list[tuple[str, Usage | str]]]:
    """What each kernel uses, or why it does not compile, by its label."""
    product, weight = FORMATS[job.format]
    found: list[tuple[str, Usage | str]] = []
    for variant in distinct(variants_of(job)):
        try:
            found.append((variant.label, compiled(variant, product, weight, job.capability)))
        except Exception as problem:
            # Whatever a compiler raises is a fault of this kernel.
            found.append((variant.label, f"{type(problem).__name__}: {problem}"))
    return job, found


def is_fault(usage: Usage | str, capability: int) -> bool:
    return isinstance(usage, str) or usage.spilled > 0 or usage.shared > SHARED_BYTES[capability]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", choices=SHARED_BYTES, default=CAPABILITIES)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=("bf16",), help="of products, of W0")
    parser.add_argument("--rank", type=int, nargs="*", default=RANKS, help="of the adapters")
    parser.add_argument("--list", action="store_true", help="a line per kernel")
    options = parser.parse_args(given)
    jobs = [Job(*each) for each in itertools.product(options.capability, options.format, (*options.rank, None))]
    jobs = [job for job in jobs if job.rank is not None or len(set(FORMATS[job.format])) == 1]
    faults = 0
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        for job, found in pool.imap(run, jobs):
            faulty = [(label, usage) for label, usage in found if is_fault(usage, job.capability)]
            faults += len(faulty)
            used = [usage for _, usage in found if isinstance(usage, Usage)]
            most = Usage(*map(max, zip(*used, strict=True))) if used else Usage(0, 0, 0)
            print(
                f"{job} {len(found):4} kernels, at most {most.registers:3} registers, {most.spilled:4} bytes spilled, "
                f"{most.shared:6} of {SHARED_BYTES[job.capability]} bytes shared: {len(faulty)} faults"
            )
            for label, usage in found if options.list else faulty:
                print("   ", label, *(usage if isinstance(usage, Usage) else [usage]))
            sys.stdout.flush()
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
