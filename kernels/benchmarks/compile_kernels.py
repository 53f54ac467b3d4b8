"""Compiles every Triton kernel for a GPU, without needing one, and reports what the machine code uses.

    python kernels/benchmarks/compile_kernels.py --capability 90 --rank 16 64 128 256

Prints one line per kernel and variant: registers, bytes spilled to local memory, shared memory, matrix instructions.
Exit code 1 if a kernel does not compile, spills registers with the default tiles, or needs too much shared memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

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
from sa3dist_kernels.formed_blocks import default_tiles
from sa3dist_kernels.formed_group import Group
from sa3dist_kernels.formed_launch import finish_plan, form_plan
from sa3dist_kernels.formed_spec import FormedSpec, product_elements
from sa3dist_kernels.qkv_gradient import BLOCK_H, BLOCK_K
from sa3dist_kernels.sums_plan import LayerShape, plan_of
from sa3dist_kernels.triton_support import dot_precision
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory available to a program.
MAX_SHARED = {80: 163 << 10, 90: 227 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMED_TYPES = {"floats": "*fp32", "scales": "*fp32", "layers": "*i64", "programs": "*i32", "span": "i32"}


def formed_variants(dtype: str, rank: int):
    """(name, kernel, constants, launch options, layers) of each distinct launch of FORM and FINISH."""
    product, side, seen = FORMATS[dtype], 1536, []
    for kind in ADAPTER_TYPES.values():
        shapes = kind.parameter_shapes(side, side, rank)
        params = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        weight = torch.empty(side, side, dtype=product, device="meta")
        frozen = frozen_constants(weight, *[torch.empty(side, rank, device="meta")] * 2) if kind.xs else None
        spec = FormedSpec(weight, params, params, kind, 1.0, frozen)
        memory = torch.empty(product_elements([spec]), dtype=product, device="meta")
        group = Group([spec], memory, default_tiles(rank, product))
        plans = [("form", form_plan(group)), ("finish", finish_plan(group))]
        if dtype == "bf16" and rank <= group.tiles.rank_step == 16:
            # Layers of another width, and tiles of ``bench_formed.py --sweep``.
            columns = dataclasses.replace(group.tiles.form_columns, narrow=True, block_i=256)
            other = dataclasses.replace(group.tiles, form_resident=None, form_columns=columns)
            plans.append(("form sweep", form_plan(Group([spec], memory, other))))
        for phase, plan in plans:
            for launch in plan:
                arguments = dict(launch.arguments)
                options = {
                    key: arguments.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in arguments
                }
                variable = {*FORMED_TYPES, "weight", "product"}
                constants = {key: value for key, value in arguments.items() if key not in variable}
                if (launch.kernel, constants) not in seen:
                    seen.append((launch.kernel, constants))
                    label = f"{launch.name}, {options['num_warps']} warps, {kind.name}"
                    yield f"rank {rank}, {phase} {label}", launch.kernel, constants, options, 1


# A clip of 30 s and one of 380 s; tokens of a prompt.
TOKENS, PROMPT = (387, 4160), 257
# (fan_in, fan_out) in the medium base: single layers, and the layers of a block, which share launches.
LAYERS = ((1536, 12288), (6144, 1536), (1536, 1536), (768, 256), (257, 1536))
BLOCK = ((1536, 7680), (1536, 1536), (1536, 3072), (1536, 1536), (1536, 1536), (1536, 12288), (6144, 1536))


def sums_groups():
    for tokens in TOKENS:
        for fan_in, fan_out in LAYERS:
            yield f"{tokens} tokens, {fan_in} to {fan_out}", [(tokens, fan_in, fan_out)]
        yield f"{tokens} tokens, a block", [(PROMPT, 1536, 4608), *((tokens, *layer) for layer in BLOCK)]


def sums_variants(dtype: str, rank: int):
    """The same for the raw sums, with all blocks and splits that real sizes lead to."""
    seen = []
    for (label, layers), kind in itertools.product(sums_groups(), ADAPTER_TYPES.values()):
        shapes = tuple(LayerShape(n, i, o, i, i * kind.cols, o, o * kind.rows) for n, i, o in layers)
        plan = plan_of(shapes, rank, kind, FORMATS[dtype], dot_precision(), torch.device("cpu"))
        for kernel, launch in (
            (sums_kernels.thin_products_kernel, plan.thin),
            (sums_kernels.raw_sums_kernel, plan.sums),
            (sums_kernels.core_sums_kernel, plan.core),
        ):
            constants = dict(launch.constants)
            options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
            variant = kernel, constants, len(layers)
            if len(launch.programs) and variant not in seen:
                seen.append(variant)
                yield f"rank {rank}, {label}, {kind.name}", kernel, constants, options, len(layers)


def qkv_variants(dtype: str):
    """The same for queries and keys and their gradient: the released models' heads, with and without pairs."""
    for pairs, heads in ((2, 24), (1, 16)):
        constants = {"H": heads, "D": 64, "P": pairs, "HALF": 16, "BLOCK_K": BLOCK_K, "BLOCK_H": BLOCK_H, "BLOCK_D": 64}
        for kernel in (queries_and_keys._queries_and_keys_kernel, qkv_gradient._qkv_gradient_kernel):
            yield f"{heads} heads, pairs of {pairs}", kernel, constants, {"num_warps": 4}, 1


def gate_variants():
    """The same for the gate's gradient: the released models' feed-forwards, with and without bias and gated values."""
    blocks = {"BLOCK_K": gate_gradient.BLOCK_K, "BLOCK_G": gate_gradient.BLOCK_G}
    for channels, bias, values in itertools.product((6144, 4096), (True, False), (True, False)):
        constants = {"G": channels, "HAS_BIAS": bias, "VALUES": values, **blocks}
        label = f"{channels} channels{', bias' if bias else ''}{', values' if values else ''}"
        yield label, gate_gradient._gate_gradient_kernel, constants, {"num_warps": gate_gradient.WARPS}, 1


def token_sums_variants(dtype: str):
    """The same for the sums of a block's modulations: joined ones, a single one, and of three clips."""
    tiles, E = token_sums.TILES, 1536
    blocks = triton.cdiv(E, tiles.channels)
    for count, clips, rights, rows in ((4, 1, 15, 10), (1, 1, 0, 1), (4, 3, 15, 10)):
        splits = min(token_sums.MAX_SPLITS, tiles.programs // (blocks * count))
        common = {"E": E, "COUNT": count, "SPLITS": splits, "CLIPS": clips}
        steps = {"BLOCK_K": tiles.tokens, "DEPTH": tiles.depth, "BLOCK_E": tiles.channels}
        constants = common | steps | {"RIGHTS": rights, "ROWS": rows, "OWNED": clips > 1}
        label = f"{count} sums, {clips} clips"
        yield label, token_sums._partial_sums_kernel, constants, {"num_warps": tiles.warps}, count
        added = common | {"SCALES": rows, "BIASES": count // 4, "BLOCK_E": token_sums.REDUCE_CHANNELS}
        yield label, token_sums._reduce_kernel, added, {"num_warps": 4}, count


# Arguments of the sums: tuples of one tensor per layer or sum, and single tensors.
OF_LAYERS = ("xs", "dxs", "dys", "zs", "rights", "lefts", "rows", "scales", "biases")
SUMS_TYPES = {"partials": "*fp32", "out": "*fp32", "sizes": "*i64", "programs": "*i32"}
UNALIGNED = ("total", "K", "eps", "span")


def signature(kernel, dtype: str, layers: int) -> dict[str, str | tuple[str, ...]]:
    """Type of every argument."""
    if "floats" in kernel.arg_names:
        return {name: FORMED_TYPES.get(name, f"*{dtype}") for name in kernel.arg_names}
    if "gamma_q" in kernel.arg_names:
        narrow = ("grad_q", "grad_k", "grad_v", "x", "gamma_q", "gamma_k", "out", "out_q", "out_k")
        others = {"cos": "*fp32", "sin": "*fp32", "is_clips": "*i1", "eps": "fp32"} | dict.fromkeys(narrow, f"*{dtype}")
        return {name: others.get(name, "i32") for name in kernel.arg_names}
    if "dz" in kernel.arg_names:
        return {name: "i32" if name == "K" else f"*{dtype}" for name in kernel.arg_names}
    of_layers = dict.fromkeys(OF_LAYERS, (f"*{dtype}",) * layers)
    others = SUMS_TYPES
    if "owner" in kernel.arg_names or "scales" in kernel.arg_names:
        # In a single sum, rows is a mask.
        of_layers["rows"] = ("*fp32" if layers > 1 else "*i1",) * layers
        others = others | {"out": f"*{dtype}", "owner": "*i1"}
    return {name: of_layers.get(name) or others.get(name, "i32") for name in kernel.arg_names}


def compiled(kernel, constants: dict, dtype: str, options: dict, capability: int, layers: int) -> dict:
    names, types = kernel.arg_names, signature(kernel, dtype, layers)
    # As for real sizes: addresses, sizes and strides are multiples of 16.
    aligned = {
        path: [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in constants and name not in UNALIGNED
        for path in ([(place, layer) for layer in range(layers)] if name in OF_LAYERS else [(place,)])
    }
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {key: value for key, value in options.items() if value is not None}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    matrix = len(re.findall(r"\b(?:HGMMA|HMMA)\b", code))
    return {"registers": registers, "spilled": spilled, "shared": built.metadata.shared, "matrix": matrix}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=MAX_SHARED, default=90, help="90: H100 and H200, 80: A100")
    parser.add_argument("--dtype", choices=FORMATS, default="bf16")
    parser.add_argument("--rank", type=int, nargs="*", default=[16], help="of the adapters")
    options = parser.parse_args()
    variants = itertools.chain.from_iterable(
        itertools.chain(formed_variants(options.dtype, rank), sums_variants(options.dtype, rank))
        for rank in options.rank
    )
    others = qkv_variants(options.dtype), token_sums_variants(options.dtype), gate_variants()
    variants = itertools.chain(variants, *others)
    faults = 0
    for name, kernel, constants, launch, layers in variants:
        used = compiled(kernel, constants, options.dtype, launch, options.capability, layers)
        faults += (used["spilled"] > 0 and "sweep" not in name) or used["shared"] > MAX_SHARED[options.capability]
        label = f"{kernel.fn.__name__.strip('_')}: {name}"
        print(
            f"{label:62} {used['registers']:4} registers {used['spilled']:5} bytes spilled {used['shared']:7} shared "
            f"{used['matrix']:4} matrix instructions",
            flush=True,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
