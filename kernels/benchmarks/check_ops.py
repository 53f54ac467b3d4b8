"""Part ``ops``: one adapted layer at the medium model's shapes, against its frozen and its materialised form.

"ours" is a micro batch with a formed W', "finished" adds FORM and FINISH, "torch" is the factored form. The
materialised form is also compiled for one type. Times are forward and backward of one layer, with cold caches.
"""

from __future__ import annotations

import dataclasses
import time

import torch
from bench_adapted_linear import DTYPES, SHAPES, make_variants
from results_file import Budget, ResultsFile
from sa3dist_kernels import ADAPTER_TYPES
from timing import interleaved, peak_bytes, summary


@dataclasses.dataclass(frozen=True)
class Sizes:
    """layers are (fan_in, fan_out, bias)."""

    layers: tuple[tuple[int, int, bool], ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    types: tuple[str, ...]
    dtype: str
    rounds: int


# Type and rank whose materialised form is also compiled, which takes seconds per layer and length.
COMPILED = ("dora-rows", 16)
TYPES = ("dora-rows", "lora", "dora-cols", "bora", "dora-rows-xs")
REAL = Sizes(
    layers=tuple(dict.fromkeys(SHAPES["medium"].values())),
    # 64 memory tokens and the latent frames of 30 s and 380 s.
    tokens=(323 + 64, 4096 + 64),
    ranks=(16, 128),
    types=TYPES,
    dtype="bf16",
    rounds=15,
)
SMALL = Sizes(((48, 80, True), (32, 48, False)), (5, 9), (4,), TYPES, "fp32", 2)
# Largest relative L2 distance of two forms' outputs and gradients; rounding stays far below.
AGREEMENT = {"fp32": 1e-4, "bf16": 0.05}


def run(results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> bool:
    """Whether the formed, factored and materialised forms agreed everywhere."""
    sizes = SMALL if tiny else REAL
    torch.manual_seed(0)
    results.set(skipped=[])
    cases = [(rank, tokens, layer) for rank in sizes.ranks for tokens in sizes.tokens for layer in sizes.layers]
    longest = 0.0
    for rank, tokens, layer in cases:
        if not budget.allows(1.5 * longest):
            results.content["skipped"].append({"layer": layer, "tokens": tokens, "rank": rank, "why": "time budget"})
            results.write()
            continue
        begin = time.monotonic()
        for row in measure_layer(sizes, layer, tokens, rank, device):
            results.add(**row)
            print(line(row), flush=True)
        longest = max(longest, time.monotonic() - begin)
    results.set(summary=summarise(results.rows))
    return all(row["agree"] for row in results.rows)


def measure_layer(sizes: Sizes, layer, tokens: int, rank: int, device: torch.device) -> list[dict]:
    """A row per adapter type, all variants measured in turn."""
    fan_in, fan_out, bias = layer
    kinds = [ADAPTER_TYPES[name] for name in sizes.types]
    dtype = DTYPES[sizes.dtype]
    compiled = COMPILED[:1] if device.type == "cuda" and rank == COMPILED[1] else ()
    variants = make_variants(fan_in, fan_out, bias, tokens, rank, kinds, device, dtype, formed=True, compiled=compiled)
    distances = {kind.name: distance(variants, kind.name) for kind in kinds}
    spans = {n: summary(t) for n, t in interleaved(variants, sizes.rounds, device, warm_up=2, cold=True).items()}
    peaks = {name: peak_bytes(variant, device) for name, variant in variants.items()}
    frozen = spans["frozen"]["median"]
    rows = []
    for kind in kinds:
        forms = ("formed", "finished", "factored", "materialised")
        ours, finished, by_torch, theirs = (f"{kind.name} {form}" for form in forms)
        by_compiler = spans.get(f"{kind.name} compiled")
        rows.append(
            {
                "fan_in": fan_in,
                "fan_out": fan_out,
                "bias": bias,
                "tokens": tokens,
                "rank": rank,
                "adapter_type": kind.name,
                "ours_ms": spans[ours],
                "finished_ms": spans[finished],
                "torch_ms": spans[by_torch],
                "frozen_ms": spans["frozen"],
                "materialised_ms": spans[theirs],
                "compiled_ms": by_compiler,
                "over_frozen": spans[ours]["median"] / frozen,
                "materialised_over_ours": spans[theirs]["median"] / spans[ours]["median"],
                "compiled_over_ours": by_compiler and by_compiler["median"] / spans[ours]["median"],
                "torch_over_ours": spans[by_torch]["median"] / spans[ours]["median"],
                "peak_bytes": {
                    "ours": peaks[ours],
                    "torch": peaks[by_torch],
                    "frozen": peaks["frozen"],
                    "materialised": peaks[theirs],
                },
                "distance": distances[kind.name],
                "agree": distances[kind.name] <= AGREEMENT[sizes.dtype],
            }
        )
    return rows


def distance(variants: dict, name: str) -> float:
    """Largest relative L2 distance of the other forms to the materialised one, over output and gradients."""
    theirs = variants[f"{name} materialised"]()
    pairs = [
        pair for form in ("finished", "factored") for pair in zip(variants[f"{name} {form}"](), theirs, strict=True)
    ]
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def line(row: dict) -> str:
    return (
        f"{row['fan_in']:5} -> {row['fan_out']:5} N {row['tokens']:5} r{row['rank']:<4}{row['adapter_type']:13} "
        f"ours {row['ours_ms']['median']:8.3f} ms  frozen {row['frozen_ms']['median']:8.3f} ({row['over_frozen']:.2f}x)"
        f"  torch {row['torch_ms']['median']:8.3f} ({row['torch_over_ours']:.2f}x)"
        f"  materialised {row['materialised_ms']['median']:8.3f} ({row['materialised_over_ours']:.2f}x)  "
        f"distance {row['distance']:.1e}"
    )


def summarise(rows: list[dict]) -> list[dict]:
    """Sums over the measured layer shapes, by tokens, rank and type."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["tokens"], row["rank"], row["adapter_type"]), []).append(row)
    summaries = []
    for (tokens, rank, name), members in groups.items():
        ours, frozen, theirs = (
            sum(row[f"{side}_ms"]["median"] for row in members) for side in ("ours", "frozen", "materialised")
        )
        ratios = {"over_frozen": ours / frozen, "materialised_over_ours": theirs / ours}
        shapes = len(members)
        summaries.append({"tokens": tokens, "rank": rank, "adapter_type": name, "layers": shapes, **ratios})
    return summaries
