"""Where a training step's time goes, by kernel and purpose, and the share of the time that has a known purpose.

    python kernels/benchmarks/profile_step.py --shape medium-base --depth 0 --frames 323

Times are device times of kernels on CUDA, and self times of operations on a CPU. Passes run as ordinary launches; as a
graph they would be the same kernels.
"""

from __future__ import annotations

import json
import math
import re
import sys

import torch
from bench_step import parse
from results_file import environment
from step_sides import Side
from timing import synchronise
from torch.profiler import ProfilerActivity, profile

STEPS = 5
# The profiler's names of driver and runtime calls that start work on the device.
LAUNCH = re.compile(r"cu(da)?(Launch\w*|GraphLaunch|Mem(cpy|set)\w*)$")
# List kernels up to this share of the time, and this many pairs of kernels with idle time between them.
LISTED_SHARE, LISTED_PAIRS = 0.95, 12
# The first pattern found in a kernel's name gives its purpose.
PURPOSES = (
    ("attention", r"flash|fmha|attention|sdpa|mha_"),
    (
        "adapters' kernels",
        r"(form|finish|column)_\w+_kernel|(thin_products|raw_sums|core_sums)_kernel|(Factored|Formed)Linear",
    ),
    (
        "matrix products",
        r"gemm|cutlass|nvjet|xmma|cublas|splitK|aten::(add|b|badd)?mm|(aten|mkldnn)::(_?linear|matmul)|convolution|conv1d",
    ),
    ("compiled element-wise", r"^triton_"),
    ("own element-wise", r"(qkv_gradient|queries_and_keys|gate_gradient)_kernel"),
    ("optimiser", r"[aA]dam"),
    ("copies and fills", r"[mM]emcpy|[mM]emset|copy|[fF]ill|CatArray|aten::(cat|clone|contiguous|zero_|to$)"),
    ("sums and norms", r"reduce|_partial_sums_kernel|[nN]orm|aten::(sum|mean|pow|linalg)|softmax"),
    ("element-wise", r"elementwise|vectorized|aten::(mul|add|sub|div|sigmoid|silu|exp|neg|tanh|r?sqrt|where|sin|cos)"),
    ("indexing", r"index|gather|scatter|arange|searchsorted"),
)


def profiled(side: Side) -> dict:
    """Milliseconds per step by purpose and by kernel, and the share of device time with a known purpose.

    ``kernels_per_step`` counts kernels, copies and fills on the device; ``launches_per_step`` the host calls that
    started them, by name, one for a whole graph. ``idle_ms`` is the device's idle time per step in consecutive steps,
    and ``idle_between`` the pairs of kernels with most of it. Both are empty on a CPU.
    """
    for _ in range(2):
        side.step()
    synchronise(side.device)
    on_cuda = side.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as recorded:
        for _ in range(STEPS):
            side.step()
        synchronise(side.device)
    spent: dict[str, tuple[float, int]] = {}
    launches: dict[str, float] = {}
    for event in recorded.key_averages():
        # On CUDA count only kernels and copies: not the operations that launch them, nor annotated ranges (an
        # optimiser's step, a compiled graph), whose kernels are counted already.
        if event.device_type != torch.autograd.DeviceType.CUDA and LAUNCH.match(event.key):
            launches[event.key] = event.count / STEPS
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        of_device = event.device_type == torch.autograd.DeviceType.CUDA
        if own > 0 and of_device == on_cuda and not (on_cuda and event.is_user_annotation):
            spent[event.key] = (own / 1e3 / STEPS, event.count / STEPS)
    total = sum(own for own, _ in spent.values())
    purposes: dict[str, float] = {}
    kernels, listed = [], 0.0
    for name, (own, calls) in sorted(spent.items(), key=lambda item: -item[1][0]):
        kind = purpose(name)
        purposes[kind] = purposes.get(kind, 0.0) + own
        if listed < LISTED_SHARE * total:
            listed += own
            kernels.append({"name": name[:120], "purpose": kind, "ms": round(own, 4), "calls": calls})
    return {
        "device_ms": total,
        "kernels_per_step": sum(calls for _, calls in spent.values()),
        "launches_per_step": launches,
        "purposes_ms": {name: round(own, 4) for name, own in sorted(purposes.items(), key=lambda item: -item[1])},
        "named_share": 1 - purposes.get("other", 0.0) / total,
        "kernels": kernels,
        **idle(
            [
                (event.time_range.start, event.time_range.end, event.name)
                for event in recorded.events()
                if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
            ]
        ),
    }


def idle(kernels: list[tuple[float, float, str]]) -> dict:
    """Milliseconds per step in which no kernel ran, and between which kernels.

    kernels   of all steps: (begin, end, name), in microseconds
    """
    between: dict[tuple[str, str], float] = {}
    ended, last = math.inf, ""
    for begin, end, name in sorted(kernels):
        if begin > ended:
            pair = last[:60], name[:60]
            between[pair] = between.get(pair, 0.0) + begin - ended
        if end > ended or math.isinf(ended):
            ended, last = end, name
    most = sorted(between.items(), key=lambda item: -item[1])[:LISTED_PAIRS]
    return {
        "idle_ms": sum(between.values()) / 1e3 / STEPS,
        "idle_between": [{"from": a, "to": b, "ms": round(spent / 1e3 / STEPS, 4)} for (a, b), spent in most],
    }


def purpose(kernel: str) -> str:
    return next((name for name, pattern in PURPOSES if re.search(pattern, kernel)), "other")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    side = Side("ours", options, device)
    side.use(options.batch, options.frames)
    row = {"frames": options.frames, "adapter_type": options.adapter_type, "rank": options.rank, **profiled(side)}
    print(json.dumps({"environment": environment(device), "rows": [row]}, indent=1))
    for name, own in row["purposes_ms"].items():
        print(f"{name:24} {own:9.2f} ms  {own / row['device_ms']:6.1%}", file=sys.stderr)
    print(f"{row['named_share']:.1%} of {row['device_ms']:.1f} ms has a purpose", file=sys.stderr)


if __name__ == "__main__":
    main()
