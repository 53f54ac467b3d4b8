"""What a run will need and how long it will take, predicted from counts; and settings that fit a given memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from sa3dist_kernels import ADAPTER_TYPES

from sa3dist.adapters import candidate_layers
from sa3dist.adapters.select import require_match
from sa3dist.commands.plan_calibration import Factor, Measured, calibrate
from sa3dist.config import Settings
from sa3dist.cost_model.devices import Device
from sa3dist.cost_model.flops import Adapter, Count, count
from sa3dist.flow.crops import crop_frames
from sa3dist.model.base import AUTOENCODER_PREFIX
from sa3dist.model.config import ModelConfig
from sa3dist.model.loading import expected_tensors, meta_roots
from sa3dist.training import memory
from sa3dist.training.cuda_graphs import wants_graphs

# A process on a GPU before it holds a tensor: context and libraries. Seen between 0.4 and 0.8 GB by driver and device.
CONTEXT_BYTES = 0.7e9
# Value, gradient and AdamW's two means of one trained number, float32.
TRAINED_BYTES = memory.VALUE_BYTES + memory.MOMENT_BYTES
# Kernels an eager step launches per counted operation, and the host's time for one: what limits short clips on a GPU.
LAUNCHES_PER_OPERATION, LAUNCH_SECONDS = 4, 5e-6


def frames_of(settings: Settings, config: ModelConfig) -> int:
    """Length of a crop; without ``duration`` the model's full length, for the longest clip is not known here."""
    seconds = config.native_seconds
    return crop_frames(settings.duration, seconds, seconds, config.sample_rate_hz, config.samples_per_frame)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run as it is planned: its settings, the model's shape, and what surrounds one process.

    frames                 length of a crop, in latent frames
    fans                   adapted layers with (fan_out, fan_in)
    base_values            numbers in the frozen network and conditioners
    ranks                  processes
    link_bytes_per_second  of the slowest link gradients are reduced over; None: not counted
    """

    settings: Settings
    config: ModelConfig
    frames: int
    fans: dict[str, tuple[int, int]]
    base_values: int
    ranks: int = 1
    link_bytes_per_second: float | None = None

    @classmethod
    def of(cls, settings: Settings, config: ModelConfig, ranks: int = 1, link: float | None = None) -> Job:
        """Raises ConfigError when the include and exclude lists select no layer."""
        candidates = candidate_layers(meta_roots(config))
        names = require_match(list(candidates), settings.include, settings.exclude)
        fans = {name: tuple(candidates[name].weight.flatten(1).shape) for name in names}
        shapes = [shape for key, shape in expected_tensors(config).items() if not key.startswith(AUTOENCODER_PREFIX)]
        values = sum(math.prod(shape) for shape in shapes)
        return cls(settings, config, frames_of(settings, config), fans, values, ranks, link)

    def changed(self, **changes: Any) -> Job:
        """The same run with other settings, include and exclude aside."""
        settings = self.settings.model_copy(update=changes)
        return dataclasses.replace(self, settings=settings, frames=frames_of(settings, self.config))

    @property
    def trained(self) -> int:
        """Numbers the adapter trains."""
        kind, rank = ADAPTER_TYPES[self.settings.adapter_type], self.settings.rank
        shapes = (shape for fans in self.fans.values() for shape in kind.parameter_shapes(*fans, rank).values())
        return sum(map(math.prod, shapes))

    @property
    def value_bytes(self) -> int:
        return 4 if self.settings.base_precision == "fp32" else 2


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Memory in bytes by what it is for, seconds of a step by what they go to, and how sure that is.

    seconds   compute, memory bandwidth, host, network; host overlaps with the device, the network does not
    """

    bytes: dict[str, float]
    recomputed_blocks: int
    fits: bool
    flops: float
    seconds: dict[str, float]
    factor: Factor

    @property
    def peak_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def step_seconds(self) -> float:
        device = self.seconds["compute"] + self.seconds["memory bandwidth"]
        return max(device, self.seconds["host"]) + self.seconds["network"]

    @property
    def limit(self) -> str:
        """What most of a step's time goes to."""
        return max(self.seconds, key=self.seconds.get)


def predict(job: Job, device: Device, measured: list[Measured]) -> Prediction:
    """Memory and time of a job on a device. measured: timed steps to calibrate with, may be empty."""
    settings, config, size = job.settings, job.config, job.value_bytes
    adapter = Adapter(ADAPTER_TYPES[settings.adapter_type], settings.rank, frozenset(job.fans), device.runs_kernels)
    needed = _held_bytes(job, device)
    largest = memory.batch_of(config, job.frames, settings.batch_size)
    counted = count(config, largest, adapter, size, size)
    choice = _choose(settings.gradient_checkpointing, counted, sum(needed.values()), device.memory_bytes)
    needed["kept for the backward pass"] = counted.kept_bytes(choice.recomputed_blocks)
    tokens = settings.batch_size * (job.frames + config.dit.num_memory_tokens)
    graphed = _graphed(job, device, needed)
    if graphed:
        needed["recorded pass"] = needed["kept for the backward pass"] + needed["working"]

    usual = memory.batch_of(config, job.frames, settings.batch_size, given_context=False)
    work = count(config, usual, adapter, size, size).total(choice.recomputed_blocks)
    factor = calibrate(measured, device, settings.model, settings.adapter_type, size, tokens)
    compute, moving = work.seconds(device.flops_per_second(size), device.bytes_per_second)
    rounds = settings.accumulation(job.ranks)
    # What a timed device's host costs is within the factor; a graph is launched at once.
    from_host = device.on_gpu and not factor.own and not graphed
    launches = LAUNCHES_PER_OPERATION * len(work.operations) if from_host else 0
    seconds = {
        "compute": rounds * factor.value * compute,
        "memory bandwidth": rounds * factor.value * moving,
        "host": rounds * launches * LAUNCH_SECONDS,
        "network": _reduction_seconds(job),
    }
    return Prediction(needed, choice.recomputed_blocks, choice.fits, rounds * work.flops, seconds, factor)


def _held_bytes(job: Job, device: Device) -> dict[str, float]:
    """Everything but what is kept for the backward pass, by name."""
    rank = job.settings.rank if ADAPTER_TYPES[job.settings.adapter_type].xs else 0
    # Norms of rows and columns; the bases of -xs types and their products with the weight.
    constants = sum((fan_out + fan_in) * (1 + 2 * rank) * 4 for fan_out, fan_in in job.fans.values())
    tokens = job.settings.batch_size * (job.frames + job.config.dit.num_memory_tokens)
    return {
        "base": float(job.value_bytes * job.base_values),
        "adapter and optimiser": float(TRAINED_BYTES * job.trained + constants),
        "working": memory.working_bytes(job.config, tokens, job.value_bytes),
        "context": CONTEXT_BYTES if device.on_gpu else 0.0,
    }


def _graphed(job: Job, device: Device, needed: dict[str, float]) -> bool:
    """Whether passes will be replayed: where the run wants it and their values fit the memory a second time."""
    settings = job.settings
    wanted = device.on_gpu and wants_graphs(settings.cuda_graphs, torch.device("cuda"), settings.number_of_steps)
    twice = sum(needed.values()) + needed["kept for the backward pass"] + needed["working"]
    return wanted and twice <= memory.USABLE_SHARE * device.memory_bytes


def _choose(setting: str, counted: Count, other: float, free: float) -> memory.Choice:
    if setting == "auto":
        return memory.fewest_recomputed(counted, other, free)
    blocks = len(counted.blocks) if setting == "on" else 0
    return memory.Choice(blocks, other + counted.kept_bytes(blocks), free)


def _reduction_seconds(job: Job) -> float:
    """One ring all-reduce of the float32 gradients: every rank sends and receives twice (ranks - 1) / ranks of them."""
    if job.link_bytes_per_second is None:
        return 0.0
    return 2 * (job.ranks - 1) / job.ranks * 4 * job.trained / job.link_bytes_per_second


def fit(job: Job, device: Device, measured: list[Measured]) -> tuple[dict[str, Any], Prediction] | None:
    """The settings to change so that the job fits the device, nearest to what was asked first; None if nothing does.

    Tried in this order: recomputing blocks, fewer clips per micro batch with more accumulation, a 16-bit base, and only
    then shorter crops.
    """
    for changes in _alternatives(job):
        prediction = predict(job.changed(**changes), device, measured)
        if prediction.fits:
            return changes, prediction
    return None


def _alternatives(job: Job) -> Iterator[dict[str, Any]]:
    settings = job.settings
    yield {}
    smallest: dict[str, Any] = {"gradient_checkpointing": "auto"} if settings.gradient_checkpointing == "off" else {}
    if smallest:
        yield smallest
    clips = settings.batch_size * settings.accumulation(job.ranks)
    for batch_size in range(settings.batch_size - 1, 0, -1):
        if clips % batch_size == 0:
            # The same clips per optimiser step, in more and smaller micro batches.
            rounds = {"batch_size": batch_size, "gradient_accumulation_steps": clips // batch_size}
            smallest = {**smallest, **rounds, "global_batch_size": None}
            yield smallest
    if settings.base_precision == "fp32":
        smallest = {**smallest, "base_precision": "bf16", "mixed_precision": "bf16"}
        yield smallest
    seconds = job.frames * job.config.samples_per_frame / job.config.sample_rate_hz
    while seconds > 1:
        # Steps of a tenth: fine enough for a proposal.
        seconds = max(1.0, math.floor(0.9 * seconds))
        yield {**smallest, "duration": float(seconds)}
