"""`sa3dist plan`: predict memory and time of a run, on this machine or on a GPU from a table."""

import argparse
import dataclasses
import json
import re
from typing import Any

from sa3dist import config
from sa3dist.commands.plan_calibration import RESULTS
from sa3dist.commands.plan_predict import Job, MemoryPlan, Prediction, fit, predict
from sa3dist.cost_model.devices import GPUS, THIS, Device, find_device
from sa3dist.data.remote.local_paths import home_path
from sa3dist.errors import ConfigError, counted, span
from sa3dist.model.loading import known_config
from sa3dist.runtime.exit_status import MANY, command, number, positive

UNITS = {"GB": 1e9, "GIB": 1 << 30}


ARGUMENTS = {
    "arguments": {"nargs": "*", "metavar": "CONFIG.yaml|REQUEST.json|key=value", "help": "settings of the run"},
    "--gpu": {"default": THIS, "help": f"{', '.join(GPUS)}, or {THIS} machine (default)"},
    "--fit": {"metavar": "24GB", "help": "plan for so much memory, and propose settings that fit it"},
    "--ranks": {"type": positive, "default": 1, "help": "processes with DDP, each on such a device"},
    "--link-gbit": {
        "type": number(float, 0.001, 1e6),
        "metavar": "X",
        "help": "gigabits/s of the slowest link between them",
    },
    "--results": {"type": home_path, "default": RESULTS, "help": "folder of benchmark results to calibrate with"},
    "--json": {"action": "store_true", "help": "print everything as JSON"},
}


def plan(options: argparse.Namespace) -> None:
    """Print the plan of ``options``."""
    # The default folder does not exist in an installed package.
    if options.results != RESULTS and not options.results.is_dir():
        raise ConfigError(f"--results: {options.results} is no folder; give one with the JSON files of gpu_check.py")
    # A plan needs no data: the address is not used.
    settings = config.build({"audio_data_url": "unknown", **config.read_arguments(options.arguments)})
    device = find_device(options.gpu)
    if options.fit:
        device = dataclasses.replace(device, memory_bytes=parse_bytes(options.fit))
    link = None if options.link_gbit is None else options.link_gbit * 1e9 / 8
    job = Job.of(settings, known_config(settings.model), options.ranks, link)
    changes = fit(job, device) if options.fit else {}
    if changes is None:
        raise ConfigError(
            f"--fit: nothing fits {device.memory_bytes / 1e9:g} GB; take a smaller model or rank, or several devices "
            f"with ZeRO-3, which this does not plan"
        )
    job = job.changed(**changes)
    prediction = predict(job, device, options.results)
    if options.json:
        print(json.dumps(as_dict(job, device, changes, prediction), indent=2))
    else:
        print("\n".join(lines(job, device, changes, prediction)))


def parse_bytes(text: str) -> float:
    """``24GB``, ``24GiB`` or ``24`` (gigabytes) as bytes. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(GB|GiB)?\s*", text, re.IGNORECASE)
    if not match or not 0 < float(match[1]) <= MANY:
        raise ConfigError(f"--fit: {text!r} is no amount of memory; write it as 24GB")
    return float(match[1]) * UNITS[(match[2] or "GB").upper()]


def as_dict(job: Job, device: Device, changes: dict[str, Any], prediction: Prediction) -> dict[str, Any]:
    planned = prediction.memory
    return {
        "device": dataclasses.asdict(device),
        "changes": {key: value for key, value in changes.items() if value is not None},
        "mode": "ddp",
        "ranks": job.ranks,
        "peak_bytes": planned.peak_bytes,
        "bytes": planned.bytes,
        "recorded_bytes": planned.recorded_bytes,
        "fits": planned.fits,
        "recomputed_blocks": planned.recomputed_blocks,
        "formed_per_use": planned.per_use,
        "flops_per_step": prediction.flops,
        "step_seconds": prediction.step_seconds,
        "seconds": prediction.seconds,
        "limit": prediction.limit,
        "total_seconds": prediction.step_seconds * job.settings.number_of_steps,
        "factor": dataclasses.asdict(prediction.factor),
    }


def lines(job: Job, device: Device, changes: dict[str, Any], prediction: Prediction) -> list[str]:
    """The plan as lines of text."""
    settings, planned = job.settings, prediction.memory
    seconds = settings.duration or job.frames * job.config.samples_per_frame / job.config.sample_rate_hz
    assumed = "" if settings.duration else " (no duration given: the model's full length)"
    step = prediction.step_seconds
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in planned.bytes.items() if value)
    recorded = f"; recorded passes take another {planned.recorded_bytes / 1e9:.1f} GB of what is free"
    fits = "fits" if planned.fits else "DOES NOT FIT"
    rate = device.flops_per_second(job.product_bytes) / 1e12
    times = ", ".join(f"{name} {value:.3g}" for name, value in prediction.seconds.items() if value)
    text = [
        f"run       {settings.model}, {settings.adapter_type} rank {settings.rank}, micro batches of "
        f"{settings.batch_size} x {seconds:.1f} s{assumed}, base in {settings.base_precision}",
        f"device    {device.name}: {device.memory_bytes / 1e9:.0f} GB, {rate:.3g} TFLOP/s, "
        f"{device.bytes_per_second / 1e9:.0f} GB/s ({device.source})",
        f"memory    {planned.peak_bytes / 1e9:.1f} GB at the peak, {fits}: {parts} GB",
        f"          {planned.recomputed_blocks} of {job.config.dit.depth} blocks recomputed"
        f"{', adapted weights formed for every use of a block' if planned.per_use else ''}"
        f"{recorded if planned.recorded_bytes else ''}",
        *ranks_lines(job, planned),
        f"step      {step:.3g} s for {prediction.flops / 1e12:.3g} TFLOP: {times} s",
        f"limit     {prediction.limit}",
        f"total     {counted(settings.number_of_steps, 'step')} in {span(step * settings.number_of_steps)}, "
        f"without start-up and encoding",
        f"evidence  time: {prediction.factor.evidence}",
        "          memory: counted on the network itself"
        + ("; host: launches estimated" if prediction.seconds["host"] else ""),
    ]
    proposed = [f"{key}={value}" for key, value in changes.items() if value is not None]
    return text + ([f"change    {' '.join(proposed)}"] if proposed else [])


def ranks_lines(job: Job, planned: MemoryPlan) -> list[str]:
    """What the plan assumes of several processes; also if a single one does not fit."""
    if job.ranks == 1 and planned.fits:
        return []
    network = "" if job.ranks == 1 or job.link_bytes_per_second else "; the network is not counted without --link-gbit"
    divided = (planned.bytes["base"] + planned.bytes["adapter and optimiser"]) / 1e9
    return [
        f"ranks     {job.ranks}; with DDP each holds all of this{network}",
        f"          ZeRO-3 is not planned: it divides base, adapter and optimiser ({divided:.1f} GB) over the ranks, "
        f"and sends the base in every pass",
    ]


# Exit code 0 with the plan on stdout, even if the run does not fit; 2 if settings or device are refused.
main = command("sa3dist plan", ARGUMENTS, plan, description="Predict memory and time of a run.")
