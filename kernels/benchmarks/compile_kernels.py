"""Compile every Triton kernel for a GPU that need not be there, and report what the machine code uses.

    python kernels/benchmarks/compile_kernels.py --capability 90 --rank 16 64 128 256

Prints one line per kernel and variant: registers, bytes spilled to local memory, shared memory, matrix instructions.
Exit code 1 when a kernel does not compile, or spills.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from sa3dist_kernels import ADAPTER_TYPES, gain_gradient, scaled_matmul, thin_norms, weight_pass
from sa3dist_kernels.formed_launch import finish_plan, form_plan
from sa3dist_kernels.formed_layout import Group, default_tiles
from sa3dist_kernels.formed_weights import FormedSpec, product_elements
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PRECISION = {"PRECISION": "ieee", "UPCAST": False}
# Arguments of the product that is contiguous along K (forward) or along M (backward), and those a type leaves out.
FORWARD, BACKWARD = {"weight_k": 1, "lift_r": 1}, {"weight_m": 1, "lift_m": 1}
TAIL, SUMS = dict.fromkeys(("tail", "tail_out")), dict.fromkeys(("other", "sums"))
PRODUCTS = {
    "rows forward": FORWARD | TAIL | SUMS | {"left_gain": None},
    "rows backward": BACKWARD | SUMS | {"out_gain": None, "bias": None},
    "bora backward": BACKWARD | TAIL | {"bias": None},
}


def product_variants(dtype: str):
    """(name, kernel, constant arguments, warps, stages) of both forms of ``scaled_matmul``."""
    tiles = (scaled_matmul.SQUARE, scaled_matmul.FEW_TOKENS, scaled_matmul.MANY_TOKENS)
    tiles = tiles if dtype != "fp32" else (scaled_matmul.SINGLE,)
    for tile, (name, fixed) in itertools.product(tiles, PRODUCTS.items()):
        if tile is scaled_matmul.MANY_TOKENS and "sums" not in fixed:
            continue
        sizes = {f"BLOCK_{side.upper()}": tile[f"block_{side}"] for side in "nmk"}
        constants = sizes | PRECISION | fixed | {"BLOCK_R": 16, "GROUP": scaled_matmul.GROUP, "EVEN_K": True}
        label = f"{name} {tile['block_n']}x{tile['block_m']}"
        yield label, scaled_matmul._fused_kernel, constants, tile["warps"], tile["stages"]
    tile = scaled_matmul.LIBRARY
    sizes = {"BLOCK_N": tile["block_n"], "BLOCK_M": tile["block_m"], "BLOCK_R": 16}
    constants = sizes | PRECISION | SUMS | {"lift_r": 1}
    yield "finish", scaled_matmul._finish_kernel, constants, tile["warps"], tile["stages"]


def other_variants(dtype: str):
    tile = {"BLOCK_N": 32, "BLOCK_M": 128}
    yield "sums", gain_gradient._sums_kernel, tile, 4, 3
    limits = {"HAS_BIAS": True, "LEAST_GAIN": gain_gradient.LEAST_GAIN, "LIMIT": gain_gradient.LIMIT}
    exact = limits | {"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": 16} | FORWARD | PRECISION
    yield "gain gradient", gain_gradient._gain_gradient_kernel, exact, 4, 3
    precision = {"PRECISION": "ieee" if dtype == "fp32" else "tf32x3"}
    for stride in ("weight_k", "weight_m"):
        tile = {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_R": 16, "thin_r": 1, stride: 1}
        yield f"{stride} is 1", weight_pass._weight_pass_kernel, tile | precision, 4, 3
    thin = {"BLOCK_D": 32, "BLOCK_R": 16, "cross_r": 1, "factor_r": 1, "gram_r": 1}
    yield "norms", thin_norms._thin_norms_kernel, thin | {"slope": None, "grad": None}, 4, 3
    unused = dict.fromkeys(("squares", "magnitude", "gain", "norms"))
    yield "gradient", thin_norms._thin_norms_kernel, thin | unused, 4, 3


FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMED_TYPES = {"floats": "*fp32", "scales": "*fp32", "layers": "*i64", "programs": "*i32", "span": "i32"}


def formed_variants(dtype: str, rank: int):
    """(name, kernel, constant arguments, launch options) of every launch of FORM and FINISH, equal ones once."""
    product, side, seen = FORMATS[dtype], 1536, []
    for kind in ADAPTER_TYPES.values():
        shapes = kind.parameter_shapes(side, side, rank)
        params = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        bases = [torch.empty(side, rank, device="meta")] * 2 if kind.xs else (None, None)
        weight = torch.empty(side, side, dtype=product, device="meta")
        spec = FormedSpec(weight, params, params, kind, 1.0, *bases)
        memory = torch.empty(product_elements([spec]), dtype=product, device="meta")
        group = Group([spec], memory, default_tiles(rank, product))
        for phase, plan in (("form", form_plan(group)), ("finish", finish_plan(group))):
            for launch in plan:
                given = dict(launch.arguments)
                options = {key: given.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in given}
                variable = {*FORMED_TYPES, "weight", "product"}
                constants = {key: value for key, value in given.items() if key not in variable}
                if (launch.kernel, constants) not in seen:
                    seen.append((launch.kernel, constants))
                    yield f"rank {rank}, {phase} {launch.name}, {kind.name}", launch.kernel, constants, options


# What is float32 whatever the format of the products; every other capital-free argument is a size or a stride.
WIDE = ["left_gain", "out_gain", "gain", "sums", "tail_out", "squares", "totals", "magnitude", "slope", "norms"]
UNALIGNED = ("N", "span", "splits", "alpha", "scale", "eps")
PRODUCT_FORMAT = ["left", "weight", "thin", "bias", "other", "tail", "out", "grad", "y", "product"]


def signature(kernel, dtype: str) -> dict[str, str]:
    """Type of every argument. The thin kernels take float32 throughout, but for the weight."""
    if "floats" in kernel.arg_names:
        return {name: FORMED_TYPES.get(name, f"*{dtype}") for name in kernel.arg_names}
    thin = kernel in (weight_pass._weight_pass_kernel, thin_norms._thin_norms_kernel)
    narrow = ["weight"] if thin else PRODUCT_FORMAT
    types = {}
    for name in kernel.arg_names:
        if name in narrow and not (kernel is gain_gradient._gain_gradient_kernel and name == "out"):
            types[name] = f"*{dtype}"
        elif name in (*WIDE, "lift", "cross", "factor", "gram") or name in PRODUCT_FORMAT:
            types[name] = "*fp32"
        else:
            types[name] = "fp32" if name in ("alpha", "scale", "eps") else "i32"
    return types


def compiled(kernel, constants: dict, dtype: str, options: dict, capability: int) -> dict:
    names, types = kernel.arg_names, signature(kernel, dtype)
    # As at the real sizes: memory starts, sizes and strides are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in constants and name not in UNALIGNED
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
    parser.add_argument("--capability", type=int, default=90, help="90: H100 and H200, 80: A100")
    parser.add_argument("--dtype", choices=FORMATS, default="bf16")
    parser.add_argument("--rank", type=int, nargs="*", default=[16], help="of the formed weights; none: without them")
    options = parser.parse_args()
    variants = [
        (name, kernel, constants, {"num_warps": warps, "num_stages": stages})
        for name, kernel, constants, warps, stages in (*product_variants(options.dtype), *other_variants(options.dtype))
    ]
    formed = itertools.chain.from_iterable(formed_variants(options.dtype, rank) for rank in options.rank)
    spills = 0
    for name, kernel, constants, launch in itertools.chain(variants, formed):
        used = compiled(kernel, constants, options.dtype, launch, options.capability)
        spills += used["spilled"]
        label = f"{kernel.fn.__name__.strip('_')}: {name}"
        print(
            f"{label:62} {used['registers']:4} registers {used['spilled']:5} bytes spilled {used['shared']:7} shared "
            f"{used['matrix']:4} matrix instructions",
            flush=True,
        )
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
