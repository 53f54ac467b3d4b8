"""Part ``step``: whole training steps on the released shapes at full depth, most telling cases first."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
import traceback

import torch
from bench_step import compare, line
from profile_step import profiled
from results_file import Budget, ResultsFile
from step_sides import MAKERS, Side
from timing import peak_bytes

# Expected of a group of which no like one has been measured yet.
FIRST_GROUP_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Group:
    """Measurements that share their models; building those takes longer than stepping them."""

    shape: str
    adapter_type: str
    rank: int
    frames: tuple[int, ...]

    @property
    def in_full(self) -> bool:
        """Whether encoding and a profile are measured too, which are the same for every adapter."""
        return (self.adapter_type, self.rank) == ("dora-rows", 16)


# 10, 30, 120 and 380 s of latent frames.
MEDIUM, SMALL = (323, 4091, 108, 1292), (323, 1291)
TYPES = ("dora-rows", "lora", "bora", "dora-rows-xs", "dora-cols")
SHAPES_FRAMES = {"medium-base": MEDIUM, "small-music-base": SMALL}
PLAN = tuple(
    Group(shape, adapter_type, rank, frames)
    for rank in (16, 128)
    for adapter_type in TYPES
    for shape, frames in SHAPES_FRAMES.items()
)
# The aims for dora-rows of rank 16 on the medium model: (frames or None for all, figure, bound, whether it is a floor).
TARGETS = (
    (323, "ratio", 8.0, True),
    (4091, "ratio", 2.2, True),
    (4091, "ratio_from_audio", 4.0, True),
    (None, "over_frozen", 1.15, False),
    (None, "named_share", 0.95, True),
    (4091, "over_floor", 1.6, False),
    (4091, "recomputing_total_bytes", 24e9, False),
)
TINY_PLAN = (Group("tiny-medium", "dora-rows", 4, (6, 9)), Group("tiny-small", "dora-rows-xs", 4, (6,)))


def run(results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> bool:
    """Returns whether both sides computed the same loss and gradients in every case, and no case failed."""
    results.set(skipped=[], failed=[])
    # The first groups also compile and measure kernels: what they took says nothing of the others.
    spent: dict[tuple[str, bool], float] = {}
    for group in TINY_PLAN if tiny else PLAN:
        if not budget.allows(spent.get((group.shape, group.in_full), 0 if tiny else FIRST_GROUP_SECONDS)):
            results.content["skipped"].append({**dataclasses.asdict(group), "why": "time budget"})
            results.write()
            continue
        begin = time.monotonic()
        try:
            measure(group, results, device, tiny)
        except Exception as problem:
            # The part fails, but device time is dear: the other groups are measured.
            traceback.print_exc()
            why = f"{type(problem).__name__}: {problem}".partition("\n")[0]
            results.content["failed"].append({**dataclasses.asdict(group), "why": why})
            results.write()
        # Models hold reference cycles; the next group needs their memory.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        spent[group.shape, group.in_full] = time.monotonic() - begin
    results.set(targets=against_targets(results.rows))
    agreed = all(row["losses_agree"] and row["gradients_agree"] for row in results.rows)
    return agreed and not results.content["failed"]


def measure(group: Group, results: ResultsFile, device: torch.device, tiny: bool) -> None:
    """One row per length of the group."""
    options = argparse.Namespace(
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
        from_audio=tiny or group.in_full,
        frames=group.frames[0],
    )
    begin, before = time.monotonic(), allocated(device)
    sides = {"ours": Side("ours", options, device)}
    sides["ours"].use(options.batch, group.frames[0])
    # AdamW makes its moments in the first step.
    sides["ours"].step()
    held = allocated(device) - before
    sides |= {name: Side(name, options, device) for name in MAKERS if name != "ours"}
    setup_seconds = time.monotonic() - begin
    for frames in group.frames:
        options.frames = frames
        row = compare(options, sides, device)
        row |= {"ours_held_bytes": held, "setup_seconds": setup_seconds}
        # What gradient_checkpointing=on would need: the least this step can run in.
        ours = sides["ours"]
        ours.replay = None
        ours.base.gradient_checkpointing = True
        recomputing = peak_bytes(ours.step, device)
        ours.base.gradient_checkpointing = False
        row["recomputing_total_bytes"] = None if recomputing is None else held + recomputing
        # The same for every adapter but in what its own kernels take.
        row["profile"] = profiled(ours) if options.from_audio else None
        row["named_share"] = row["profile"] and row["profile"]["named_share"]
        results.add(**row)
        print(line(row), flush=True)


def against_targets(rows: list[dict]) -> list[dict]:
    """Every aim that was measured: what was found, what is wanted, whether it is met."""
    found = []
    for row in rows:
        if (row["shape"], row["adapter_type"], row["rank"]) != ("medium-base", "dora-rows", 16):
            continue
        for frames, figure, bound, is_floor in TARGETS:
            if frames in (None, row["frames"]) and row[figure] is not None:
                met = row[figure] >= bound if is_floor else row[figure] <= bound
                wanted = f"{'at least' if is_floor else 'at most'} {bound:g}"
                found.append(
                    {"frames": row["frames"], "figure": figure, "found": row[figure], "wanted": wanted, "met": met}
                )
    return found


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
