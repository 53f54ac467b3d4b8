"""Part ``run``: all stages through the real command line, on a base of random weights in a directory.

Shards and encodes a zip of clips and trains 200 steps; kills the process in the middle and continues with the same
command; starts a second run on the warm work_dir and stops it by a signal; loads the published file onto the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import statistics
import tempfile
import time
import traceback
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from command_runs import STOP_SECONDS, Command, command_environment, largest_difference
from random_directory import write_released_shape
from results_file import Budget, ResultsFile
from timing import synchronise

import sa3dist
from sa3dist import adapters
from sa3dist.model.tiny import write_tiny_base
from sa3dist.training import checkpoint

# Largest relative difference of losses after resuming. Draws are repeated exactly, but CUDA adds in another order.
RESUME_TOLERANCE = {"cpu": 0.0, "cuda": 5e-3}
# From command to first step: on a warm work_dir, and the first time (design, on an H100).
WARM_SECONDS, COLD_SECONDS = 20.0, 45.0
ENCODING_FACTOR = 60.0
# With less time left, no part is started: loading the base alone takes much of it.
MIN_SECONDS = 20.0
# Share of the remaining time for the first start.
FIRST_SHARE = 0.6
# Fields of rows that must be true.
VERDICTS = ("same", "every_step_once", "equal", "acts")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """kill_at: the step after which the first run is killed; encoded_seconds: clips that are timed in the encoder."""

    shape: str
    words: tuple[str, ...]
    clips: int
    steps: int
    save_every: int
    kill_at: int
    encoded_seconds: tuple[float, ...]
    model_bytes: int


REAL = Sizes("medium-base", ("rank=16",), 64, 200, 50, 120, (10.0, 29.7, 47.3), 11 << 30)
TINY_WORDS = ("rank=4", "base_precision=fp32", "mixed_precision=no", "deterministic=true", "duration=2")
TINY_WORDS += ("report=false", "gradient_checkpointing=off")
TINY = Sizes("tiny", TINY_WORDS, 6, 24, 4, 6, (1.0, 2.1), 1 << 20)


def run(results: ResultsFile, budget: Budget, device: torch.device, tiny: bool) -> bool:
    """Whether resuming repeated the losses, the file loaded again, and every command ended as expected."""
    sizes = TINY if tiny else REAL
    results.set(skipped=[], failed=[])
    with scratch_directories(sizes.model_bytes) as (model, scratch):
        environment = command_environment(scratch, device)
        write_inputs(results, sizes, model, scratch, device)
        words = [
            f"model={model}",
            f"audio_data_url={scratch / 'clips.zip'}",
            f"work_dir={scratch / 'work'}",
            f"number_of_steps={sizes.steps}",
            f"save_every={sizes.save_every}",
            "pre_encode=true",
            "log_every=1",
            *sizes.words,
        ]
        output_dir = scratch / "first"
        parts = {
            "train and resume": lambda: killed_and_resumed(
                results, budget, sizes, environment, output_dir, words, device
            ),
            "warm start": lambda: warm_start(results, budget, environment, scratch / "second", words),
            "reload": lambda: reloaded(results, sizes, model, output_dir, device),
            "encode alone": lambda: encoder_alone(results, budget, sizes, model, device),
        }
        for what, part in parts.items():
            if not budget.allows(0 if tiny else MIN_SECONDS):
                results.content["skipped"].append({"what": what, "why": "time budget"})
                continue
            try:
                part()
            except Exception as problem:
                # Record the failure and continue: device time is scarce.
                traceback.print_exc()
                results.content["failed"].append({"what": what, "why": f"{type(problem).__name__}: {problem}"})
            results.write()
    results.set(targets=against_targets(results.rows))
    verdicts = [row[name] for row in results.rows for name in VERDICTS if name in row]
    return all(verdicts) and not results.content["failed"] and not results.content["skipped"]


@contextlib.contextmanager
def scratch_directories(model_bytes: int) -> Iterator[tuple[Path, Path]]:
    """A folder for the model, in shared memory if it fits, and one for everything else."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and shutil.disk_usage(shared).free > 1.5 * model_bytes
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(tempfile.TemporaryDirectory(dir=shared if in_memory else None))
        yield Path(model), Path(stack.enter_context(tempfile.TemporaryDirectory()))


def write_inputs(results: ResultsFile, sizes: Sizes, model: Path, scratch: Path, device: torch.device) -> None:
    begin = time.monotonic()
    if sizes.shape == "tiny":
        write_tiny_base(model)
        written = (model / "model.safetensors").stat().st_size
    else:
        written = write_released_shape(model, sizes.shape, device)
    results.add(what="write model", seconds=time.monotonic() - begin, bytes=written, directory=str(model.parent))
    begin = time.monotonic()
    seconds = write_clips(scratch / "clips.zip", sizes.clips)
    results.add(what="write clips", seconds=time.monotonic() - begin, clips=sizes.clips, audio_seconds=seconds)


def write_clips(path: Path, count: int) -> float:
    """Write captioned clips of 0.5 to 12 s, 16-bit stereo, to a zip; their total seconds. Needs no audio library."""
    rate, total = 44100, 0
    draw = np.random.default_rng(1)
    with zipfile.ZipFile(path, "w") as archive:
        for number, seconds in enumerate(draw.permutation(np.geomspace(0.5, 12, count))):
            times_N = np.arange(round(seconds * rate)) / rate
            hertz, total = 80 * 2 ** draw.uniform(0, 5), total + len(times_N)
            left_N = np.sin(2 * np.pi * hertz * times_N) * (0.6 + 0.3 * np.sin(2 * np.pi * 3 * times_N))
            stereo_NC = np.stack([left_N, 0.7 * left_N + 0.05 * draw.standard_normal(len(times_N))], axis=1)
            data = io.BytesIO()
            with wave.open(data, "wb") as file:
                file.setnchannels(2)
                file.setsampwidth(2)
                file.setframerate(rate)
                file.writeframes((np.clip(stereo_NC, -1, 1) * 32000).astype("<i2").tobytes())
            archive.writestr(f"tone_{number:03}.wav", data.getvalue())
            archive.writestr(f"tone_{number:03}.txt", f"a trembling tone at {hertz:.0f} Hz over quiet noise")
    return total / rate


def killed_and_resumed(
    results: ResultsFile, budget: Budget, sizes: Sizes, environment, output_dir: Path, words: list[str], device
) -> None:
    """Train, SIGKILL, run the same command again: steps taken twice must have the same losses."""
    with Command(environment, output_dir, words) as command:
        # If it hangs, some time is left for the other parts.
        first_step = command.wait_for_step(1, FIRST_SHARE * budget.left())
        results.add(what="first start", command_to_first_step_seconds=first_step, **start_of(results, command.rows()))
        command.wait_for_step(sizes.kill_at, budget.left())
        command.kill()
        before = command.rows()
        results.add(what="train", **pace(before), said=command.output())
    with Command(environment, output_dir, words) as command:
        seconds = command.finish(budget.left())
        after = command.rows()
    resumed = next(row for row in after if "resumed_from" in row)
    again = [row for row in after if row["step"] > resumed["resumed_from"]]
    difference = largest_difference(again, before)
    results.add(
        what="resume",
        killed_after=before[-1]["step"],
        resumed_from=resumed["resumed_from"],
        steps_taken_twice=before[-1]["step"] - resumed["resumed_from"],
        largest_relative_loss_difference=difference,
        same=difference <= RESUME_TOLERANCE[device.type],
        every_step_once=[row["step"] for row in after] == list(range(1, sizes.steps + 1)),
        seconds=seconds,
        startup_seconds=resumed["startup_seconds"],
        **pace(again),
    )


def warm_start(results: ResultsFile, budget: Budget, environment, output_dir: Path, words: list[str]) -> None:
    """Start a new run on the warm work_dir; SIGTERM after its first steps must end it with exit code 75."""
    with Command(environment, output_dir, words) as command:
        first_step = command.wait_for_step(1, budget.left())
        rows = command.rows()
        command.stop()
        stopped = time.monotonic()
        command.finish(min(budget.left(), STOP_SECONDS), expected=75)
    results.add(
        what="warm start",
        command_to_first_step_seconds=first_step,
        stop_seconds=time.monotonic() - stopped,
        **start_of(results, rows),
    )


def start_of(results: ResultsFile, rows: list[dict]) -> dict:
    """Seconds of each phase before the first step, and the encoding speed relative to real time."""
    startup = rows[0]["startup_seconds"]
    audio = next(row["audio_seconds"] for row in results.rows if row["what"] == "write clips")
    # Each clip is encoded in both polarities; loading the encoders and encoding captions are included.
    return {"startup_seconds": startup, "encode_stage_real_time_factor": 2 * audio / startup["encode"]}


def pace(rows: list[dict]) -> dict:
    """Steps per second and losses. Speeds are of the second half; the first compiles and records."""
    seconds = [row["step_seconds"] for row in rows]
    late = seconds[len(seconds) // 2 :]
    return {
        "steps": len(rows),
        "step_seconds": {"median": statistics.median(late), "min": min(late), "max": max(late)},
        "steps_per_second": len(late) / sum(late),
        "data_wait": statistics.median(row["data_wait"] for row in rows[len(rows) // 2 :]),
        "peak_bytes": rows[-1].get("peak_bytes"),
        "losses": [row["loss"] for row in rows],
    }


def load(model: Path, device: torch.device):
    return sa3dist.load_base(model, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)


def reloaded(results: ResultsFile, sizes: Sizes, model: Path, output_dir: Path, device) -> None:
    """The published file must equal the last checkpoint rounded to float16, and must change the velocity."""
    begin = time.monotonic()
    base = load(model, device)
    sa3dist.load_adapter(base, output_dir / "lora.safetensors")
    synchronise(device)
    seconds = time.monotonic() - begin
    loaded = adapters.adapter_parameters(base)
    saved = checkpoint.load(checkpoint.path_of(output_dir, sizes.steps)).adapters
    equal = loaded.keys() == saved.keys() and all(
        torch.equal(loaded[name].detach().cpu(), value.half().float()) for name, value in saved.items()
    )
    velocities = []
    for strength in (1.0, 0.0):
        adapters.set_strength(base, strength)
        velocities.append(velocity(base))
    acts = bool(velocities[0].isfinite().all()) and not torch.equal(*velocities)
    published = json.loads((output_dir / "result.json").read_text(encoding="utf-8"))["lora_file"]["file_size"]
    results.add(what="export and reload", seconds=seconds, equal=equal, acts=acts, file_size=published)


@torch.no_grad()
def velocity(base) -> torch.Tensor:
    """Velocity of fixed noisy latents."""
    draw = torch.Generator().manual_seed(6)
    noisy_BDT = torch.randn(1, base.latent_channels, 32, generator=draw).to(base.device)
    prompt_BLC = torch.randn(1, base.prompt_tokens, base.config.cond_dim, generator=draw).to(base.device)
    mask_BL = torch.ones(1, base.prompt_tokens, dtype=torch.bool, device=base.device)
    one = torch.ones(1, device=base.device)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
        return base.velocity(noisy_BDT, 0.5 * one, prompt_BLC, mask_BL, 3 * one)


def encoder_alone(results: ResultsFile, budget: Budget, sizes: Sizes, model: Path, device) -> None:
    """The autoencoder's encoder on clips of several lengths, in one polarity."""
    base = load(model, device)
    longest = 0.0
    for length in sizes.encoded_seconds:
        if not budget.allows(2 * longest):
            results.content["skipped"].append({"what": f"encode {length} s", "why": "time budget"})
            continue
        begin = time.monotonic()
        results.add(what="encode alone", **encoding(base, length))
        longest = max(longest, time.monotonic() - begin)


def encoding(base, seconds: float) -> dict:
    """The autoencoder's encoder on one clip in one polarity: at this length for the first time, and again."""
    samples = round(seconds * base.sample_rate_hz)
    draw = torch.Generator().manual_seed(7)
    audio_BCN = 0.1 * torch.randn(1, base.config.audio_channels, samples, generator=draw)
    spent = []
    for _ in range(3):
        synchronise(base.device)
        begin = time.perf_counter()
        base.encode_audio(audio_BCN).cpu()
        spent.append(time.perf_counter() - begin)
    again = min(spent[1:])
    return {
        "audio_seconds": seconds,
        "first_seconds": spent[0],
        "again_seconds": again,
        "real_time_factor": seconds / again,
    }


def against_targets(rows: list[dict]) -> list[dict]:
    """Each target of this part: measured value, bound, and whether it is met."""
    by_what = {row["what"]: row for row in rows}
    starts = (("first start", COLD_SECONDS), ("warm start", WARM_SECONDS))
    compared = [
        {
            "figure": f"{what}, command to first step",
            "found": value,
            "wanted": f"at most {bound:g} s",
            "met": value <= bound,
        }
        for what, bound in starts
        if (value := by_what.get(what, {}).get("command_to_first_step_seconds")) is not None
    ]
    factors = [row["real_time_factor"] for row in rows if row["what"] == "encode alone"]
    if factors:
        slowest = min(factors)
        wanted = f"at least {ENCODING_FACTOR:g} times real time"
        compared.append({"figure": "encoder", "found": slowest, "wanted": wanted, "met": slowest >= ENCODING_FACTOR})
    return compared
