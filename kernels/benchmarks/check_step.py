"""Part ``step``: whole training steps of the medium model at full depth, most informative cases first.

    python kernels/benchmarks/check_step.py --compile TYPE     # fill the compilers' caches for one adapter type

Programs are compiled ahead, by one process per adapter type in parallel; in turn it would take half a minute each.
Measured first is dora-rows of rank 16 with the frozen model and the baseline, with a profile and a mix of unequal
lengths; then the other eight types, relative to the frozen step measured before.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from bench_step import compare, line
from profile_step import profiled
from results_file import Budget, ResultsFile
from sa3dist_kernels import ADAPTER_TYPES
from step_sides import MAKERS, Side
from timing import interleaved, milliseconds, peak_bytes, summary

# Counts of count_launches.py, made without a device; a test compares them with the code.
COUNTED = Path(__file__).parent / "results" / "launches.json"
# Expected duration of the first group measured in full, and of the first other group.
FIRST_GROUP_SECONDS = {True: 60.0, False: 15.0}


@dataclasses.dataclass(frozen=True)
class Group:
    """Measurements that share a model; building it takes longer than its steps.

    in_full   with the frozen model and the baseline, a profile and unequal lengths
    """

    shape: str
    adapter_type: str
    rank: int
    frames: tuple[int, ...]
    in_full: bool = False


# 30 and 380 s of latent frames.
FRAMES = (323, 4091)
# 2000 tokens with the memory tokens. From there on, steps without graphs should take little more than device time.
LAUNCHED_FRAMES = 1936
# How long to wait for the processes that compile ahead.
COMPILING_SECONDS = 75.0
# The longest clip of the released models, in latent frames.
LONGEST = 4096
FIRST = ("dora-rows", 16)
PLAN = (
    Group("medium-base", *FIRST, FRAMES, in_full=True),
    *(Group("medium-base", name, 16, FRAMES) for name in ADAPTER_TYPES if name != FIRST[0]),
)
TINY_PLAN = (
    # One length: reading a profile takes seconds.
    Group("tiny-medium", "dora-rows", 4, (6,), in_full=True),
    Group("tiny-medium", "bora-xs", 4, (6, 9)),
)
# Number of lengths in a mix, and their range relative to the central length.
MIXED, SHORTEST_SHARE, LONGEST_SHARE = 24, 0.8, 1.2
# Targets on an H100 (medium-base, rank 16): frames, figure (milliseconds, ratio or bytes), upper bound, and whether it
# is for dora-rows or for the other types.
TARGETS = (
    (323, "frozen_ms", 12.0, True),
    (4091, "frozen_ms", 95.0, True),
    (323, "ours_ms", 22.0, True),
    (4091, "ours_ms", 105.0, True),
    (323, "unequal_over_equal", 1.1, True),
    (4091, "unequal_over_equal", 1.1, True),
    (LAUNCHED_FRAMES, "launched_over_device", 1.3, True),
    (4091, "launched_over_device", 1.3, True),
    (323, "total_bytes", 7e9, True),
    (4091, "total_bytes", 16e9, True),
    (323, "per_use_total_bytes", 4.5e9, True),
    (4091, "recomputing_total_bytes", 7.9e9, True),
    (323, "over_frozen", 1.9, False),
    (4091, "over_frozen", 1.25, False),
)


def run(results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> bool:
    """Whether both sides computed the same loss and gradients in all cases, and no case failed."""
    results.set(skipped=[], failed=[], launched=[])
    if device.type == "cuda":
        compile_ahead(results, budget, PLAN, device)
    # By in_full: the first group also compiles, so its duration does not predict the others'.
    spent: dict[bool, float] = {}
    for group in TINY_PLAN if tiny else PLAN:
        if not budget.allows(spent.get(group.in_full, 0 if tiny else FIRST_GROUP_SECONDS[group.in_full])):
            results.content["skipped"].append({**dataclasses.asdict(group), "why": "time budget"})
            results.write()
            continue
        begin = time.monotonic()
        try:
            measure = measure_in_full if group.in_full else measure_type
            measure(group, results, budget, device, tiny)
        except Exception as problem:
            # Record the failure and continue: device time is scarce.
            traceback.print_exc()
            why = f"{type(problem).__name__}: {problem}".partition("\n")[0]
            results.content["failed"].append({**dataclasses.asdict(group), "why": why})
            results.write()
        # Models hold reference cycles; the next group needs their memory.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        spent[group.in_full] = time.monotonic() - begin
    results.set(targets=against_targets([*results.rows, *results.content["launched"]]))
    agreed = all(row[name] for row in results.rows for name in ("losses_agree", "gradients_agree") if name in row)
    return agreed and not results.content["failed"]


def compile_ahead(results: ResultsFile, budget: Budget, plan: tuple[Group, ...], device: torch.device) -> None:
    """Fill this process's compiler caches with what all groups need. What fails here is compiled later."""
    begin = time.monotonic()
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, tempfile.mkdtemp(prefix="compiled-"))
    processes = {
        group.adapter_type: subprocess.Popen(
            [sys.executable, __file__, "--compile", group.adapter_type, "--shape", group.shape, "--device", device.type]
        )
        for group in plan
    }
    exit_codes = {}
    for name, process in processes.items():
        try:
            exit_codes[name] = process.wait(
                max(0.1, min(COMPILING_SECONDS, budget.left()) - (time.monotonic() - begin))
            )
        except subprocess.TimeoutExpired:
            process.kill()
            exit_codes[name] = process.wait()
    results.set(compiled_ahead={"seconds": round(time.monotonic() - begin, 1), "exit_codes": exit_codes})


def compile_type(shape: str, adapter_type: str, device: torch.device) -> None:
    """Take one step of a type, and of the frozen model, on two blocks: they compile the same programs as all blocks."""
    group = next(group for group in (*PLAN, *TINY_PLAN) if (group.shape, group.adapter_type) == (shape, adapter_type))
    options = options_of(group, tiny=shape.startswith("tiny"))
    options.depth = 2
    for name in ("ours", "frozen") if group.in_full else ("ours",):
        side = Side(name, options, device)
        # Longest first, as in a run: the compiler chooses tiles for the first length it sees.
        for frames in sorted(group.frames, reverse=True):
            side.use(options.batch, frames)
            side.step()


def options_of(group: Group, tiny: bool) -> argparse.Namespace:
    return argparse.Namespace(
        shape=group.shape,
        depth=2 if tiny else None,
        adapter_type=group.adapter_type,
        rank=group.rank,
        precision="fp32" if tiny else "bf16",
        batch=1,
        repeats=2 if tiny else 7,
        skip_memory=tiny,
        compile="auto",
        cuda_graphs="auto",
        from_audio=False,
        frames=group.frames[0],
    )


def measure_in_full(group: Group, results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> None:
    """One row per length, with all measurements of a step."""
    options = options_of(group, tiny)
    begin, before = time.monotonic(), allocated(device)
    sides = {"ours": Side("ours", options, device)}
    ours = sides["ours"]
    ours.use(options.batch, group.frames[0])
    # The first step allocates AdamW's moments.
    ours.step()
    per_use = per_use_bytes(ours, before, device)
    held_bytes = allocated(device) - before
    sides |= {name: Side(name, options, device) for name in MAKERS if name != "ours"}
    setup_seconds = time.monotonic() - begin
    for frames in group.frames:
        options.frames = frames
        row = compare(options, sides, device)
        row |= {"ours_held_bytes": held_bytes, "setup_seconds": setup_seconds}
        step_bytes = row["ours_step_bytes"]
        row["total_bytes"] = None if step_bytes is None else held_bytes + step_bytes
        row["profile"] = profiled(ours)
        row["named_share"] = row["profile"]["named_share"]
        row["frozen_profile"] = profiled(sides["frozen"])
        for name, key in ((group.adapter_type, "counted_kernels"), ("frozen", "frozen_counted_kernels")):
            row[key] = counted_kernels(group.shape, name, frames)
        # Memory with gradient_checkpointing=on, the minimum for this step.
        ours.replay = None
        ours.base.gradient_checkpointing = True
        recomputing = peak_bytes(ours.step, device)
        ours.base.gradient_checkpointing = False
        row["recomputing_total_bytes"] = None if recomputing is None else held_bytes + recomputing
        row["per_use_total_bytes"] = per_use if frames == group.frames[0] else None
        results.add(**row)
        print(line(row), flush=True)
    for row in results.rows[-len(group.frames) :]:
        launched(ours, group, row["frames"], results, options.repeats, row["profile"])
    if not tiny:
        launched(ours, group, LAUNCHED_FRAMES, results, options.repeats)
    # Last: it may exceed the budget.
    for row in results.rows[-len(group.frames) :]:
        row |= mixed_lengths(ours, row["frames"], row["ours_ms"], budget, device, tiny)
        results.write()


def launched(
    side: Side, group: Group, frames: int, results: ResultsFile, repeats: int, profile: dict | None = None
) -> None:
    """Add to ``launched`` of the results: a step without graphs, and its ratio to the device time of its kernels.

    profile   of such a step, replayed or not; None: profile here
    """
    side.use(1, frames)
    side.replay = None
    for _ in range(2):
        side.step()
    step_ms = statistics.median(milliseconds(side.step, side.device) for _ in range(repeats))
    device_ms = (profile or profiled(side))["device_ms"]
    row = {
        "shape": group.shape,
        "adapter_type": group.adapter_type,
        "rank": group.rank,
        "frames": frames,
        "launched_ms": round(step_ms, 3),
        "device_ms": round(device_ms, 3),
        "launched_over_device": round(step_ms / device_ms, 3),
    }
    results.content["launched"].append(row)
    results.write()
    print(f"{frames} frames without graphs: {step_ms:.1f} ms, {row['launched_over_device']}x the device's", flush=True)


def per_use_bytes(ours: Side, before: int, device: torch.device) -> int | None:
    """Peak bytes of a step with ``adapter_products: per_use``; None if weights are not formed.

    before   bytes allocated before ``ours`` was created
    No graph may have been captured yet: W' moves.
    """
    if ours.formed is None:
        return None
    ours.formed.allocate(per_use=True)
    ours.step()
    total = allocated(device) - before + peak_bytes(ours.step, device)
    ours.formed.allocate(per_use=False)
    return total


def measure_type(group: Group, results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> None:
    """One row per length: our step of this type, relative to the frozen step measured with the first type."""
    options = options_of(group, tiny)
    begin, before = time.monotonic(), allocated(device)
    side = Side("ours", options, device)
    held_bytes, setup_seconds = None, time.monotonic() - begin
    for frames in group.frames:
        options.frames = frames
        side.use(options.batch, frames)
        loss = side.step().item()
        held_bytes = held_bytes or allocated(device) - before
        step_bytes = peak_bytes(side.step, device)
        side.record()
        span = summary(interleaved({"ours": side.step}, options.repeats, device, warm_up=1)["ours"])
        frozen = frozen_ms(results.rows, group.shape, frames)
        row = {
            "shape": group.shape,
            "depth": len(side.base.dit.transformer.layers),
            "adapter_type": group.adapter_type,
            "rank": group.rank,
            "precision": options.precision,
            "batch": options.batch,
            "frames": frames,
            "compiled": side.compiled,
            "graphed": side.replay is not None,
            "ours_ms": round(span["median"], 3),
            "spread_ms": [round(span["min"], 3), round(span["max"], 3)],
            "frozen_ms": frozen,
            "over_frozen": frozen and round(span["median"] / frozen, 3),
            "counted_kernels": counted_kernels(group.shape, group.adapter_type, frames),
            "ours_loss": loss,
            "total_bytes": None if step_bytes is None else held_bytes + step_bytes,
            "setup_seconds": setup_seconds,
        }
        results.add(**row)
        print(
            f"{group.shape} {frames:5} frames {group.adapter_type:13} r{group.rank:<4}ours {row['ours_ms']:9.1f} ms"
            f"  ({row['over_frozen']}x frozen)  loss {loss:.5f}",
            flush=True,
        )


def counted_kernels(shape: str, name: str, frames: int) -> int | None:
    """Kernels of a step according to ``count_launches.py``, at its longest clip of at most ``frames``.

    name   an adapter type, or "frozen"
    None for models other than medium.
    """
    if not shape.startswith("medium"):
        return None
    rows = json.loads(COUNTED.read_text(encoding="utf-8"))["rows"]
    fitting = [row for row in rows if row["adapter_type"] == name and row["frames"] <= frames]
    return max(fitting, key=lambda row: row["frames"])["total"] if fitting else None


def frozen_ms(rows: list[dict], shape: str, frames: int) -> float | None:
    """The frozen model's step at this length, from the row that has it; None if there is none."""
    return next((row["frozen_ms"] for row in rows if (row["shape"], row["frames"]) == (shape, frames)), None)


def mixed_lengths(side: Side, frames: int, equal_ms: float, budget: Budget, device: torch.device, tiny: bool) -> dict:
    """Mean step over clips of unequal lengths around ``frames``, and its ratio to the step at ``frames``.

    equal_ms   the step at ``frames``
    Each length is stepped once for warm-up, then timed. Lengths that did not fit the budget are missing from
    ``unequal_frames``.
    """
    spent, slowest, lengths = {}, 0.0, mix_of(frames, 3 if tiny else MIXED)
    for length in lengths:
        if not budget.allows(2 * slowest):
            break
        begin = time.monotonic()
        side.use(1, length, max(lengths))
        if side.replay is None:
            # The first length of its rung.
            side.step()
            side.record()
        side.step()
        spent[length] = min(milliseconds(side.step, device) for _ in range(2))
        slowest = max(slowest, time.monotonic() - begin)
    if not spent:
        return {"unequal_frames": [], "unequal_ms": None, "unequal_over_equal": None}
    mean = statistics.fmean(spent.values())
    return {
        "unequal_frames": list(spent),
        "unequal_each_ms": [round(value, 3) for value in spent.values()],
        "unequal_ms": round(mean, 3),
        # Relative to the measured frames: lengths may be missing or cut. None if fewer than half were measured.
        "unequal_over_equal": round(mean / equal_ms * frames / statistics.fmean(spent), 3)
        if 2 * len(spent) >= len(lengths)
        else None,
    }


def mix_of(frames: int, count: int) -> list[int]:
    """``count`` lengths spread evenly around ``frames``, in a fixed random order."""
    first, last = SHORTEST_SHARE * frames, min(LONGEST_SHARE * frames, LONGEST)
    lengths = [round(first + (last - first) * (i + 0.5) / count) for i in range(count)]
    random.Random(8).shuffle(lengths)
    return lengths


def against_targets(rows: list[dict]) -> list[dict]:
    """Each target that was measured: value, bound, and whether it is met."""
    compared = []
    for row in rows:
        if (row["shape"], row["rank"]) != ("medium-base", FIRST[1]):
            continue
        for frames, figure, bound, of_first in TARGETS:
            fits = frames == row["frames"] and of_first == (row["adapter_type"] == FIRST[0])
            if fits and row.get(figure) is not None:
                compared.append(
                    {
                        "adapter_type": row["adapter_type"],
                        "frames": frames,
                        "figure": figure,
                        "found": row[figure],
                        "wanted": f"at most {bound:g}",
                        "met": row[figure] <= bound,
                    }
                )
    return compared


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", required=True, metavar="TYPE", choices=ADAPTER_TYPES)
    parser.add_argument("--shape", default="medium-base")
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    compile_type(asked.shape, asked.compile, torch.device(asked.device))


if __name__ == "__main__":
    main()
