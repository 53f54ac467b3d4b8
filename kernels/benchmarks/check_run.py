"""Part ``run``: a real training run through sa3dist.loop on random weights; resumed midway, saved and reloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import torch
from results_file import Budget, ResultsFile
from step_sides import make_base
from synthetic_clips import SyntheticClips

from sa3dist import adapters, loop, memory, resume
from sa3dist.data.stream import MicroBatch, MicroBatches, StreamSettings, loader, micro_indices
from sa3dist.parallel import checkpoint
from sa3dist.parallel.group import Group
from sa3dist.parallel.signals import StopRequest
from sa3dist.passes import choose_passes
from sa3dist.trainer import Trainer
from sa3dist.work import Plan

# A resumed run repeats the draws exactly; its losses differ by the order in which CUDA adds gradients, no more.
RESUMED_LOSSES = {"cpu": 0.0, "cuda": 5e-3}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """save_every is where the resumed run starts; long_frames and long_steps are a second, longer-clip run."""

    shape: str
    depth: int | None
    dtype: torch.dtype
    frames: int
    steps: int
    save_every: int
    long_frames: int
    long_steps: int
    rank: int
    clips: int


REAL = Sizes("medium-base", None, torch.bfloat16, 323, 300, 150, 4091, 20, 16, 24)
TINY = Sizes("tiny-medium", 2, torch.float32, 12, 6, 3, 20, 2, 4, 4)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The settings the loop reads; the validated tree needs pydantic, which a bare machine may lack."""

    mixed_precision: str
    save_every: int
    work_dir: Path
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    context_weight: float = 1.0
    gradient_compression: str = "none"
    keep_checkpoints: int = 4
    log_every: int = 1
    log_clips: bool = False
    batch_size: int = 1
    gradient_checkpointing: str = "auto"
    compile: str = "auto"
    deterministic: bool = False
    cuda_graphs: str = "auto"


def run(results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> bool:
    """Returns whether resuming repeated the losses, the file came back, and the base stayed as it was."""
    sizes = TINY if tiny else REAL
    results.set(skipped=[])
    begin = time.monotonic()
    base = make_base(sizes.shape, sizes.depth, device, sizes.dtype)
    untouched = weights_checksum(base)
    with tempfile.TemporaryDirectory() as scratch:
        unbroken = trained(base, sizes, sizes.frames, sizes.steps, Path(scratch) / "unbroken", device)
        results.add(what="train", setup_seconds=time.monotonic() - begin, **report(unbroken))
        resumed = trained(
            base, sizes, sizes.frames, sizes.steps, Path(scratch) / "resumed", device, checkpoint_of(unbroken, sizes)
        )
        difference = largest_difference(unbroken.rows[sizes.save_every :], resumed.rows)
        same = difference <= RESUMED_LOSSES[device.type]
        results.add(what="resume", largest_relative_loss_difference=difference, same=same, **report(resumed))
        came_back = round_trip(base, Path(scratch) / "lora.safetensors")
        results.add(what="save and load", equal=came_back)
        if budget.allows(60 if not tiny else 0):
            long = trained(base, sizes, sizes.long_frames, sizes.long_steps, Path(scratch) / "long", device)
            results.add(what="train long clips", **report(long))
        else:
            results.set(skipped=[{"what": "train long clips", "why": "time budget"}])
    unchanged = weights_checksum(base) == untouched
    results.add(what="frozen base", unchanged=unchanged)
    return same and came_back and unchanged


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one run left behind: its rows of metrics.jsonl and figures beside them."""

    output_dir: Path
    rows: list[dict]
    frames: int
    attach_seconds: float
    train_seconds: float
    peak_bytes: int
    recomputed_blocks: int
    replayed_shapes: int


def trained(base, sizes: Sizes, frames: int, steps: int, output_dir: Path, device, saved=None) -> Trained:
    """Attach a fresh adapter and train it to ``steps``, from ``saved`` when given."""
    begin = time.monotonic()
    adapters.detach_adapter(base)
    adapters.attach_adapter(base, rank=sizes.rank, seed=7)
    attached = time.monotonic()
    settings = RunSettings("bf16" if sizes.dtype == torch.bfloat16 else "no", sizes.save_every, output_dir)
    samples = make_samples(base, SyntheticClips(base, sizes.clips, frames), frames)
    work = Plan(
        steps=steps,
        accumulation=1,
        micro_batch=1,
        global_batch=1,
        seed=samples.settings.seed,
        identity={"batch_size": 1},
        clip_keys=[clip.key for clip in samples.encoded.clips],
        order=samples.order,
    )
    trainer = Trainer(base, adapters.adapter_parameters(base), settings, work, Group(0, 1, device))
    if saved is not None:
        resume.check_identity(saved, work.identity, output_dir)
        trainer.restore(saved)
    first = trainer.step
    choose_passes(trainer, settings, frames)
    output_dir.mkdir(parents=True)
    with contextlib.closing(batches(samples, first, work, device)) as stream:
        loop.train(trainer, stream, StopRequest(), output_dir, first or None, lambda: memory.memory_figures(device))
    rows = [json.loads(text) for text in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return Trained(
        output_dir=output_dir,
        rows=rows,
        frames=frames,
        attach_seconds=attached - begin,
        train_seconds=time.monotonic() - attached,
        peak_bytes=rows[-1]["peak_bytes"],
        recomputed_blocks=base.recomputed_blocks,
        replayed_shapes=trainer.graphs.shapes if trainer.graphs else 0,
    )


def make_samples(base, clips: SyntheticClips, frames: int) -> MicroBatches:
    stream = StreamSettings(
        seed=42,
        micro_batch=1,
        crop_frames=frames,
        prompt_dropout=0.1,
        seconds_total_of="file",
        shift=base.config.distribution_shift,
    )
    return MicroBatches(clips, stream)


def batches(samples: MicroBatches, first: int, work: Plan, device) -> Generator[MicroBatch, None, None]:
    indices = micro_indices(first + 1, work.steps, work.accumulation, 0, 1)
    workers = 2 if device.type == "cuda" else 0
    return loader(samples, indices, lambda index: None, workers, device)


def checkpoint_of(run_: Trained, sizes: Sizes) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.path_of(run_.output_dir, sizes.save_every))


def report(run_: Trained) -> dict:
    """Figures of one run; the first step, which picks kernels, is told apart from the rest."""
    seconds = [row["step_seconds"] for row in run_.rows]
    losses = [row["loss"] for row in run_.rows]
    tenth = max(1, len(losses) // 5)
    return {
        "frames": run_.frames,
        "steps": len(run_.rows),
        "first_step_seconds": seconds[0],
        "step_seconds": {"median": statistics.median(seconds[1:]), "min": min(seconds[1:]), "max": max(seconds[1:])},
        "data_wait": statistics.median(row["data_wait"] for row in run_.rows[1:]),
        "attach_seconds": run_.attach_seconds,
        "train_seconds": run_.train_seconds,
        "peak_bytes": run_.peak_bytes,
        "recomputed_blocks": run_.recomputed_blocks,
        "replayed_shapes": run_.replayed_shapes,
        "loss_first": statistics.fmean(losses[:tenth]),
        "loss_last": statistics.fmean(losses[-tenth:]),
        "losses": losses,
    }


def largest_difference(rows: list[dict], others: list[dict]) -> float:
    """Largest relative difference of two runs' losses, step by step."""
    pairs = list(zip(rows, others, strict=True))
    assert all(row["step"] == other["step"] for row, other in pairs)
    return max(abs(row["loss"] - other["loss"]) / abs(row["loss"]) for row, other in pairs)


def round_trip(base, path: Path) -> bool:
    """Whether a saved adapter, loaded onto the bare base, has the trained values rounded to float16."""
    adapters.save_adapter(base, path, {"step": 1})
    expected = {name: value.detach().half().float() for name, value in adapters.adapter_parameters(base).items()}
    adapters.detach_adapter(base)
    adapters.load_adapter(base, path)
    found = adapters.adapter_parameters(base)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def weights_checksum(base) -> int:
    """Sum of the base's bytes, on its device: no frozen weight may change."""
    frozen = (value for name, value in base.state_dict().items() if adapters.attach.SLOT not in name)
    return sum(int(value.contiguous().view(torch.uint8).sum(dtype=torch.int64)) for value in frozen if value.numel())
