"""The work of one run, and how it divides over steps, ranks and micro batches."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import torch

from sa3dist import __version__
from sa3dist.data.batches.order import ClipOrder
from sa3dist.data.remote.fetch import redacted
from sa3dist.errors import counted
from sa3dist.formats import digest_of
from sa3dist.training import checkpoint, lr_schedule, resume
from sa3dist.training.lr_schedule import Schedule

if TYPE_CHECKING:
    from sa3dist.data.batches.batch_source import BatchSource
    from sa3dist.settings import Settings


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """How one run divides its work.

    accumulation    micro batches per rank and step
    global_batch    clips per step over all ranks
    identity        JSON values by name that a checkpoint must share to be continued
    clip_keys       keys of the dataset's clips, in index order; empty for a stream without an index
    order           which clip each slot trains on; None = the plain shuffle
    schedule        the learning rate of each step; None = the settings' learning_rate throughout
    description     content of config.json but for the step; saved with every checkpoint for an offline export
    adapt_memory    ``on_oom: adapt``: when a step runs out of memory, the next start recomputes blocks
    out_of_memory_at_step   step at which an earlier start ran out of memory with adapt_memory: every block
                    is recomputed since; None = no start did
    """

    steps: int
    accumulation: int
    micro_batch: int
    global_batch: int
    seed: int
    identity: dict[str, Any]
    clip_keys: list[str]
    order: ClipOrder | None = None
    schedule: Schedule | None = None
    description: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapt_memory: bool = False
    out_of_memory_at_step: int | None = None

    def position(self, step: int) -> dict[str, int]:
        """The step and, for a data set with an end, the number of finished epochs."""
        epochs = {"epoch": step * self.global_batch // len(self.clip_keys)} if self.clip_keys else {}
        return {"step": step, **epochs}

    def summary(self, processes: int, crop_seconds: float, recomputed_blocks: int, saved_step: int | None) -> str:
        """The plan as a line of the log. saved_step: where a run continues, None for a fresh one."""
        each = f"batch_size {self.micro_batch} x {counted(processes, 'process', 'processes')} x {self.accumulation}"
        recomputing = f", recomputing {counted(recomputed_blocks, 'block')} to save memory" if recomputed_blocks else ""
        continuing = f", continuing after step {saved_step}" if saved_step else ""
        return (
            f"training {counted(self.steps, 'step')} of {counted(self.global_batch, 'clip')} ({each} accumulated), "
            f"crops of {crop_seconds:.1f} s{recomputing}{continuing}"
        )

    def clips_of_step(self, step: int) -> list[str]:
        """Keys of the clips of all ranks in a step, in slot order."""
        slots = range((step - 1) * self.global_batch, step * self.global_batch)
        order = self.order or ClipOrder(self.seed, len(self.clip_keys))
        return [self.clip_keys[order.clip_of_slot(slot)] for slot in slots]


def make(
    settings: Settings,
    source: BatchSource,
    identity: dict[str, Any],
    saved: checkpoint.Checkpoint | None,
    world_size: int,
    noted_step: int | None,
) -> RunPlan:
    """The plan of a fresh run, or of one continued from ``saved``. Raises CheckpointError if its batch does not divide.

    noted_step   where the previous start ran out of memory, from its status.json
    """
    accumulation = resume.accumulation_of(saved, settings, world_size)
    global_batch = accumulation * settings.batch_size * world_size
    urls = {"audio_data_url": settings.audio_data_url, "lora_checkpoint_url": settings.lora_checkpoint_url}
    urls["validation"] = settings.validation_source
    # URLs may hold credentials, and users give these files away.
    public = {**settings.as_dict(), **{key: redacted(url) for key, url in urls.items() if url}}
    return RunPlan(
        steps=settings.number_of_steps,
        accumulation=accumulation,
        micro_batch=settings.batch_size,
        global_batch=global_batch,
        seed=settings.seed,
        identity=identity,
        clip_keys=[clip.key for clip in source.index.clips],
        order=source.order,
        schedule=lr_schedule.of_settings(settings),
        adapt_memory=settings.on_oom == "adapt",
        out_of_memory_at_step=resume.out_of_memory_at(saved, settings, noted_step),
        description={
            "sa3dist_version": __version__,
            "torch_version": torch.__version__,
            "base_model": settings.model,
            "base_sha256": identity["base_sha256"],
            **source.describe(),
            "effective_batch_size": global_batch,
            "world_size": world_size,
            "lora_config": identity["lora_config"],
            "config_sha256": digest_of(json.dumps(public)),
            "settings": public,
        },
    )
