"""One adapted layer, forward and backward: the factored op against the frozen layer and the materialised weight.

    python kernels/benchmarks/bench_adapted_linear.py --shape small --tokens 192 --rank 16

frozen        the same layer without adapter: x @ W0.T + bias and the gradient of x (``frozen_linear``)
materialised  W' by a float32 parametrisation that autograd differentiates, as in the reference
compiled      the same with ``torch.compile`` (--compile)
All variants of a layer run in turn in one process, so that a busy machine slows them alike; medians are compared.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from results_file import write_result
from sa3dist_kernels import (
    ADAPTER_TYPES,
    FormedSpec,
    FormedWeights,
    adapted_linear,
    effective_weight_reference,
    formed_linear,
    frozen_constants,
    frozen_linear,
)
from timing import interleaved, peak_bytes, summary

# fan_in, fan_out, bias of one transformer block, in the order it runs them.
SHAPES = {
    "small": {
        "self_attn.to_qkv": (1024, 3072, False),
        "self_attn.to_out": (1024, 1024, False),
        "cross_attn.to_q": (1024, 1024, False),
        "cross_attn.to_kv": (1024, 2048, False),
        "cross_attn.to_out": (1024, 1024, False),
        "ff.ff.0.proj": (1024, 8192, True),
        "ff.ff.2": (4096, 1024, True),
    },
    "medium": {
        "self_attn.to_qkv": (1536, 7680, False),
        "self_attn.to_out": (1536, 1536, False),
        "cross_attn.to_q": (1536, 3072, False),
        "cross_attn.to_kv": (1536, 4608, False),
        "cross_attn.to_out": (1536, 1536, False),
        "ff.ff.0.proj": (1536, 12288, True),
        "ff.ff.2": (6144, 1536, True),
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Scaling alpha / rank; alpha = rank.
SCALE = 1.0


def make_variants(
    fan_in, fan_out, bias, tokens, rank, kinds, device, dtype, formed=False, compiled: Collection[str] = ()
):
    """Name -> function that runs one forward and backward pass and returns output and gradients.

    formed     add "<type> formed", one micro batch with a formed W' and raw sums instead of gradients, as in training
               on a GPU; and "<type> finished", the same with FORM and FINISH
    compiled   types for which to add "<type> compiled": the materialised form, compiled
    """
    weight = (torch.randn(fan_out, fan_in, device=device) / fan_in**0.5).to(dtype)
    offset = torch.randn(fan_out, device=device).to(dtype) if bias else None
    x = torch.randn(tokens, fan_in, device=device).to(dtype).requires_grad_()
    grad = torch.randn(tokens, fan_out, device=device).to(dtype)
    # Any bases do for timing; computing singular ones takes longer than the whole benchmark.
    bases = [torch.linalg.qr(torch.randn(side, rank, device=device))[0].contiguous() for side in (fan_out, fan_in)]

    def run(layer, params):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer()
        return [y, *torch.autograd.grad(y, [x, *params.values()], grad)]

    variants = {"frozen": lambda: run(lambda: frozen_linear(x, weight, offset), {})}
    for kind in kinds:
        frozen = frozen_constants(weight, *(bases if kind.xs else ()))
        shapes = kind.parameter_shapes(fan_out, fan_in, rank)
        params = {key: torch.randn(shape, device=device).mul_(0.1).requires_grad_() for key, shape in shapes.items()}

        def factored(kind=kind, frozen=frozen, params=params):
            return run(lambda: adapted_linear(x, weight, offset, params, kind, SCALE, frozen=frozen), params)

        def materialised_layer(kind=kind, frozen=frozen, params=params):
            merged = effective_weight_reference(weight, params, kind, SCALE, frozen)
            return F.linear(x, merged.to(dtype), offset)

        variants[f"{kind.name} factored"] = factored
        if formed:
            passes, whole = formed_variants(weight, offset, params, kind, frozen, x, grad)
            variants[f"{kind.name} formed"], variants[f"{kind.name} finished"] = passes, whole
        variants[f"{kind.name} materialised"] = functools.partial(run, materialised_layer, params)
        if kind.name in compiled:
            by_compiler = torch.compile(materialised_layer, dynamic=False)
            variants[f"{kind.name} compiled"] = functools.partial(run, by_compiler, params)
    return variants


def formed_variants(weight, bias, params, kind, frozen, x, grad):
    """(passes of one micro batch, FORM + passes + FINISH); each returns output and gradients or raw sums."""
    sums = torch.zeros(sum(value.numel() for value in params.values()), device=x.device, requires_grad=True)
    sums.grad = torch.zeros_like(sums)
    parts = sums.grad.split([value.numel() for value in params.values()])
    grads = {name: part.view(value.shape) for part, (name, value) in zip(parts, params.items(), strict=True)}
    spec = FormedSpec(
        weight, {name: value.detach() for name, value in params.items()}, grads, kind, SCALE,
        frozen if kind.xs else None,
    )  # fmt: skip
    formed_weights = FormedWeights([spec], x.dtype)
    formed_weights.form()
    layer = formed_weights.layers[0]

    def passes():
        z = formed_linear(x, sums, layer.weight_OI, layer.left_OR, layer.right_RI, kind)
        y = z if bias is None else z + bias
        return [y, *torch.autograd.grad(y, [x, sums], grad)]

    def whole():
        formed_weights.form()
        y, dx, raw_sums = passes()
        sums.grad.copy_(raw_sums)
        formed_weights.finish()
        return [y, dx, *grads.values()]

    return passes, whole


def check(variants, kinds, dtype):
    """Raise AssertionError unless factored and materialised forms agree."""
    limit = 1e-4 if dtype == torch.float32 else 0.05
    for kind in kinds:
        pairs = zip(variants[f"{kind.name} factored"](), variants[f"{kind.name} materialised"](), strict=True)
        for ours, theirs in pairs:
            error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
            assert error < limit, f"{kind.name}: factored and materialised differ by {error:.1e}"


def measure(options, kinds, device):
    rows = []
    for layer, (fan_in, fan_out, bias) in SHAPES[options.shape].items():
        sizes = fan_in, fan_out, bias, options.tokens, options.rank
        compiled = options.types if options.compile else ()
        variants = make_variants(*sizes, kinds, device, DTYPES[options.dtype], compiled=compiled)
        check(variants, kinds, DTYPES[options.dtype])
        for name, times in interleaved(variants, options.repeats, device).items():
            span = summary(times)
            rows.append(
                {
                    "layer": layer,
                    "fan_in": fan_in,
                    "fan_out": fan_out,
                    "variant": name,
                    "milliseconds": span["median"],
                    "spread": [span["min"], span["max"]],
                    "peak_bytes": peak_bytes(variants[name], device),
                }
            )
            print(f"{layer:18} {fan_in:5} -> {fan_out:5}  {name:26} {span['median']:9.2f} ms", flush=True)
    return rows


def summarise(rows, kinds):
    """By type: time of all layers of the block, ratios to the other forms, and peak memory of a layer in each form."""
    total, peak = {}, {}
    for row in rows:
        total[row["variant"]] = total.get(row["variant"], 0.0) + row["milliseconds"]
        peak[row["variant"]] = max(peak.get(row["variant"], 0), row["peak_bytes"])
    summary = {}
    print(f"\n{'type':14} {'factored':>10} {'x frozen':>9} {'materialised / factored':>24} {'compiled / factored':>20}")
    for kind in kinds:
        ours = total[f"{kind.name} factored"]
        ratio = ours / total["frozen"]
        summary[kind.name] = {"milliseconds": ours, "over_frozen": ratio}
        gains = []
        for form, width in (("materialised", 24), ("compiled", 20)):
            theirs = total.get(f"{kind.name} {form}")
            summary[kind.name][f"{form}_over_factored"] = None if theirs is None else theirs / ours
            gains.append(" " * width if theirs is None else f"{theirs / ours:{width}.2f}")
        forms = {"frozen": "frozen", "factored": f"{kind.name} factored", "materialised": f"{kind.name} materialised"}
        summary[kind.name]["layer_peak_bytes"] = {form: peak.get(variant) for form, variant in forms.items()}
        print(f"{kind.name:14} {ours:7.1f} ms {ratio:9.2f} {' '.join(gains)}".rstrip())
    return summary


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=192, help="rows of x: memory tokens and frames of all clips")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: base and autocast in bfloat16")
    parser.add_argument("--types", nargs="+", choices=ADAPTER_TYPES, default=list(ADAPTER_TYPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="measure the compiled materialised form as well")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser.parse_args()


def main():
    options = parse_options()
    torch.manual_seed(0)
    device = torch.device(options.device)
    kinds = [ADAPTER_TYPES[name] for name in options.types]
    rows = measure(options, kinds, device)
    write_result(options, device, summary=summarise(rows, kinds), rows=rows)


if __name__ == "__main__":
    main()
