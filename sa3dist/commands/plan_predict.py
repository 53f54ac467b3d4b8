"""Predict memory and step time of a run from counted operations, and find settings that fit a given memory."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sa3dist_kernels import ADAPTER_TYPES

from sa3dist.adapters import candidate_layers
from sa3dist.adapters.select import require_match
from sa3dist.commands.plan_calibration import Factor, calibrate, forming_passes
from sa3dist.config import Settings
from sa3dist.cost_model.devices import Device
from sa3dist.cost_model.fake_network import BLOCKS, AdapterShape, BatchShape, FakeNetwork, Numerics
from sa3dist.flow.crops import crop_frames
from sa3dist.model.base import AUTOENCODER_PREFIX
from sa3dist.model.compiled import wants_compile
from sa3dist.model.config import ModelConfig
from sa3dist.model.loading import expected_tensors, meta_roots
from sa3dist.training.cuda_graphs import wants_graphs
from sa3dist.training.memory import USABLE_SHARE, fewest_recomputed, working_bytes
from sa3dist.training.model_setup import DTYPES

# Memory of a GPU process without tensors: context and libraries. Measured: 0.4 to 0.8 GB, by driver and device.
CONTEXT_BYTES = 0.7e9
# Per trained number, float32: value, gradient and AdamW's two moments.
TRAINED_BYTES = 16
# Kernel launches per counted operation of an eager step, and the host's time per launch, which limits short clips.
LAUNCHES_PER_OPERATION, LAUNCH_SECONDS = 4, 5e-6


def frames_of(settings: Settings, config: ModelConfig) -> int:
    """Length of a crop; without ``duration`` the model's full length, since the longest clip is not known."""
    seconds = config.native_seconds
    return crop_frames(settings.duration, seconds, seconds, config.sample_rate_hz, config.samples_per_frame)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to plan: its settings, the model's shape, and the number of processes.

    frames                 length of a crop, in latent frames
    fans                   adapted layers -> (fan_out, fan_in)
    base_values            number of values in the frozen network and conditioners
    ranks                  number of processes
    link_bytes_per_second  of the slowest link between them; None: communication is not counted
    networks               cache of counted networks, shared with jobs derived by ``changed``
    """

    settings: Settings
    config: ModelConfig
    frames: int
    fans: dict[str, tuple[int, int]]
    base_values: int
    ranks: int = 1
    link_bytes_per_second: float | None = None
    networks: dict[tuple[AdapterShape, Numerics], FakeNetwork] = dataclasses.field(default_factory=dict)

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
        """The same run with other settings (not include and exclude)."""
        settings = self.settings.model_copy(update=changes)
        return dataclasses.replace(self, settings=settings, frames=frames_of(settings, self.config))

    @property
    def trained(self) -> int:
        """Number of trained values."""
        kind, rank = ADAPTER_TYPES[self.settings.adapter_type], self.settings.rank
        shapes = (shape for fans in self.fans.values() for shape in kind.parameter_shapes(*fans, rank).values())
        return sum(map(math.prod, shapes))

    @property
    def product_bytes(self) -> int:
        """Bytes per value of the operands of the network's matrix products."""
        narrow = self.settings.mixed_precision == "bf16" or self.settings.base_precision != "fp32"
        return 2 if narrow else 4

    def forms(self, device: Device) -> bool:
        """Whether the run forms adapted weights on this device."""
        choice = self.settings.adapter_products
        return choice in ("formed", "per_use") or (choice == "auto" and device.runs_kernels)

    def per_use(self, device: Device) -> list[bool]:
        """Whether weights are formed for every use of a block: the alternatives a run tries, in order."""
        settings = self.settings
        if settings.adapter_products == "auto" and self.forms(device) and settings.gradient_checkpointing != "off":
            return [False, True]
        return [settings.adapter_products == "per_use"]

    def network(self, device: Device) -> FakeNetwork:
        """The network to count for this device."""
        settings, formed = self.settings, self.forms(device)
        kind = torch.device("cuda" if device.on_gpu else "cpu")
        whole_blocks = formed and wants_compile(settings.compile, kind, settings.number_of_steps)
        adapter = AdapterShape(ADAPTER_TYPES[settings.adapter_type], settings.rank, frozenset(self.fans), formed)
        numerics = Numerics(DTYPES[settings.base_precision], settings.mixed_precision == "bf16", whole_blocks)
        if (adapter, numerics) not in self.networks:
            self.networks[adapter, numerics] = FakeNetwork(self.config, adapter, numerics)
        return self.networks[adapter, numerics]


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Memory of a process in bytes, by purpose.

    recorded_bytes   additional memory of recorded CUDA graphs; 0 if they are off or do not fit
    per_use          whether adapted weights are formed for every use of a block
    """

    bytes: dict[str, float]
    recomputed_blocks: int
    fits: bool
    recorded_bytes: float
    per_use: bool

    @property
    def peak_bytes(self) -> float:
        return sum(self.bytes.values())


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted memory, operations and time of a step.

    seconds   by limit: compute, memory bandwidth, fixed, host, network; the host overlaps with the device, the network
              does not
    factor    the calibration used
    """

    memory: MemoryPlan
    flops: float
    seconds: dict[str, float]
    factor: Factor

    @property
    def step_seconds(self) -> float:
        device = self.seconds["compute"] + self.seconds["memory bandwidth"] + self.seconds["fixed"]
        return max(device, self.seconds["host"]) + self.seconds["network"]

    @property
    def limit(self) -> str:
        """The largest part of a step's time."""
        return max(self.seconds, key=self.seconds.get)


def plan_memory(job: Job, device: Device, given_context: bool = True) -> MemoryPlan:
    """Plan the memory of a job on a device.

    given_context   False: for micro batches without inpainting context, which need slightly less
    """
    settings, usable = job.settings, USABLE_SHARE * device.memory_bytes
    batch = BatchShape(settings.batch_size, job.frames, given_context)
    counted = job.network(device).count(batch, backward=False)
    for per_use in job.per_use(device):
        needed = _held_bytes(job, device, per_use)
        blocks = job.config.dit.depth if per_use or settings.gradient_checkpointing == "on" else 0
        if settings.gradient_checkpointing == "auto":
            other = sum(needed.values())
            blocks = fewest_recomputed(counted, other, device.memory_bytes, least=blocks).recomputed_blocks
        needed["kept for the backward pass"] = counted.saved_bytes(blocks)
        if sum(needed.values()) <= usable:
            break
    peak, again = sum(needed.values()), needed["kept for the backward pass"] + needed["working"]
    records = device.on_gpu and wants_graphs(settings.cuda_graphs, torch.device("cuda"), settings.number_of_steps)
    return MemoryPlan(needed, blocks, peak <= usable, again if records and peak + again <= usable else 0.0, per_use)


def _held_bytes(job: Job, device: Device, per_use: bool) -> dict[str, float]:
    """Memory by purpose, without activations kept for the backward pass."""
    kind, rank = ADAPTER_TYPES[job.settings.adapter_type], job.settings.rank
    # Norms of rows and columns; for -xs types also the frozen factors and their products with the weight.
    constants = sum((fan_out + fan_in) * (1 + 2 * rank * kind.xs) * 4 for fan_out, fan_in in job.fans.values())
    formed: collections.Counter[str] = collections.Counter()
    for name, (fan_out, fan_in) in job.fans.items():
        # With per_use all blocks share the memory of the largest one.
        block = name.removeprefix(BLOCKS).partition(".")[0] if per_use and name.startswith(BLOCKS) else ""
        formed[block] += fan_out * fan_in + rank * (fan_out + fan_in)
    values = formed.pop("", 0) + max(formed.values(), default=0)
    tokens = job.settings.batch_size * (job.frames + job.config.dit.num_memory_tokens)
    return {
        "base": float(DTYPES[job.settings.base_precision].itemsize * job.base_values),
        "formed weights": float(job.product_bytes * values if job.forms(device) else 0),
        "adapter and optimiser": float(TRAINED_BYTES * job.trained + constants),
        "working": working_bytes(job.config, tokens, DTYPES[job.settings.base_precision].itemsize),
        "context": CONTEXT_BYTES if device.on_gpu else 0.0,
    }


def predict(job: Job, device: Device, results: Path) -> Prediction:
    """Memory and time of a job on a device. results: folder of timed steps, see ``calibrate``; may be empty."""
    settings, planned = job.settings, plan_memory(job, device)
    work = job.network(device).count(BatchShape(settings.batch_size, job.frames)).total(planned.recomputed_blocks)
    factor = calibrate(results, device, settings.batch_size * job.frames, settings.adapter_type)
    compute, moving = work.seconds(device.flops_per_second(job.product_bytes), device.bytes_per_second)
    rounds = settings.accumulation(job.ranks)
    # A measured factor includes the host's time; a recorded graph is a single launch.
    from_host = device.on_gpu and not factor.measured and not planned.recorded_bytes
    launches = LAUNCHES_PER_OPERATION * len(work.operations) if from_host else 0
    # Per use: in the forward and backward pass of every micro batch; otherwise once per step.
    passes = forming_passes(ADAPTER_TYPES[settings.adapter_type], 2 * rounds if planned.per_use else 1)
    weights = job.product_bytes * sum(map(math.prod, job.fans.values())) if job.forms(device) else 0
    forming = passes * weights / device.bytes_per_second
    seconds = {
        "compute": rounds * factor.value * compute,
        "memory bandwidth": factor.value * (rounds * moving + forming),
        "fixed": rounds * factor.fixed_seconds,
        "host": rounds * launches * LAUNCH_SECONDS,
        "network": _reduction_seconds(job),
    }
    return Prediction(planned, rounds * work.flops, seconds, factor)


def _reduction_seconds(job: Job) -> float:
    """Ring all-reduce of the float32 gradients: every rank sends and receives 2 (ranks - 1) / ranks of them."""
    if job.link_bytes_per_second is None:
        return 0.0
    return 2 * (job.ranks - 1) / job.ranks * 4 * job.trained / job.link_bytes_per_second


def fit(job: Job, device: Device) -> dict[str, Any] | None:
    """The smallest change of settings that makes the job fit the device; None if nothing does.

    Tries in this order: recomputing blocks, forming weights per use, fewer clips per micro batch with more
    accumulation, a 16-bit base, shorter crops.
    """
    for changes in _alternatives(job):
        changed = job.changed(**changes)
        # Skip the slow count if the memory held between steps alone does not fit.
        held = sum(_held_bytes(changed, device, changed.per_use(device)[-1]).values())
        if held <= USABLE_SHARE * device.memory_bytes and plan_memory(changed, device).fits:
            return changes
    return None


def _alternatives(job: Job) -> Iterator[dict[str, Any]]:
    settings = job.settings
    yield {}
    smallest: dict[str, Any] = {"gradient_checkpointing": "auto"} if settings.gradient_checkpointing == "off" else {}
    if smallest:
        yield smallest
    if settings.adapter_products == "formed":
        smallest = {**smallest, "adapter_products": "per_use"}
        yield smallest
    clips = settings.batch_size * settings.accumulation(job.ranks)
    for batch_size in range(settings.batch_size - 1, 0, -1):
        if clips % batch_size == 0:
            # The same number of clips per optimiser step, in more and smaller micro batches.
            rounds = {"batch_size": batch_size, "gradient_accumulation_steps": clips // batch_size}
            smallest = {**smallest, **rounds, "global_batch_size": None}
            yield smallest
    if settings.base_precision == "fp32":
        smallest = {**smallest, "base_precision": "bf16", "mixed_precision": "bf16"}
        yield smallest
    seconds = job.frames * job.config.samples_per_frame / job.config.sample_rate_hz
    while seconds > 1:
        # Reduce by a tenth at a time.
        seconds = max(1.0, math.floor(0.9 * seconds))
        yield {**smallest, "duration": float(seconds)}
