"""One run: the settings, the processes, and each stage with what it needs from the ones before."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import yaml

from sa3dist import __version__, adapters, encode, export, loop, shard
from sa3dist.config import Settings
from sa3dist.data.batches.loader import MicroBatches, loader, micro_indices
from sa3dist.data.batches.micro_batch import MicroBatch, StreamSettings
from sa3dist.data.batches.streaming import StreamedBatches, StreamedClips, finisher, streaming_loader
from sa3dist.data.batches.worker_shards import LanePlaces
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.collect import collect
from sa3dist.data.latents.crops import CropsInFlight, EncodedCrops
from sa3dist.data.latents.source import (
    LatentDataset,
    StreamedDataset,
)
from sa3dist.data.remote.fetch import redacted
from sa3dist.data.source.archive import check_local
from sa3dist.data.source.check import Measure
from sa3dist.data.source.cut_captions import say_cut_captions
from sa3dist.errors import ConfigError, counted
from sa3dist.flow.crops import crop_frames
from sa3dist.formats import DatasetIndex, atomic_path, digest_of
from sa3dist.parallel import zero_config
from sa3dist.runtime.liveness import PREPARATION_SECONDS
from sa3dist.runtime.process_group import Group, main_process_first
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import checkpoint, lr_schedule, model_setup, resume
from sa3dist.training.acceleration import choose_acceleration
from sa3dist.training.rank_checks import check_same_start
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.startup_times import Startup
from sa3dist.training.trainer import Trainer

log = logging.getLogger(__name__)


def make_deterministic() -> None:
    """Only deterministic kernels from here on; a kernel that has no deterministic form raises."""
    # cuBLAS reads this at its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class Run:
    """The stages in the order they are called: open_base, shard, encode, prepare, train, export."""

    def __init__(
        self, settings: Settings, group: Group, stop: StopRequest, out_of_memory_at_step: int | None = None
    ) -> None:
        """out_of_memory_at_step: where the start before ran out of memory, as its status.json notes it."""
        self.settings = settings
        self.group = group
        self.stop = stop
        self.trainer: Trainer | None = None
        self._warm_start_sha256: str | None = None
        self._saved_step: int | None = None
        self.startup = Startup()
        self._out_of_memory_at_step = out_of_memory_at_step
        self._frames = 0

    @property
    def step(self) -> int:
        return self.trainer.step if self.trainer else 0

    def check(self) -> None:
        """Refuse at once what needs no preparation to be seen wrong. Raises ConfigError, DataError, CheckpointError."""
        settings = self.settings
        for key in ("output_dir", "work_dir"):
            path = getattr(settings, key)
            if path.exists() and not path.is_dir():
                raise ConfigError(f"{key}: {path} is a file, expected a directory; choose another {key}")
        # Rank 0 reads it; on other hosts it need not be.
        main_process_first(self.group, "find-source", lambda: check_local(settings.audio_data_url), self.stop)
        if self.group.deepspeed is not None:
            zero_config.check(self.group.deepspeed)
        if settings.cuda_graphs == "on" and (self.group.device.type != "cuda" or self.group.deepspeed is not None):
            raise ConfigError("cuda_graphs: on needs a CUDA device and a run without DeepSpeed; use cuda_graphs=auto")
        if settings.resume not in ("auto", "never"):
            checkpoint.load(Path(settings.resume))
        elif settings.resume == "never" or not checkpoint.list_all(settings.output_dir):
            settings.accumulation(self.group.world_size)

    def open_base(self):
        """The frozen base with fresh adapters, started from lora_checkpoint_url when given.

        Comes first, so that a wrong model, rank, include list or adapter file is refused before hours of preparation.
        Each part together: a rank that cannot read the model takes the others along with its reason.
        """
        self._enter("base")
        base, self._warm_start_sha256 = model_setup.open_base(self.settings, self.group, self.stop, self.startup)
        return base

    def shard(self, measure: Measure | None = None) -> DatasetIndex:
        """Stage one on rank 0; every rank reads the index it leaves. Latent shards need no such stage.

        measure   as in ``build_shards``
        """
        self._enter("shard")
        self.startup.begin("check_clips")
        return shard.open_dataset(self.settings, self.group, self.stop, measure)

    def encode(self, base, index: DatasetIndex, everything: bool | None = None) -> EncodedClips:
        """Stage two. everything: encode all clips now, or each on first use; None does as ``pre_encode`` says."""
        self._enter("encode")
        self.startup.begin("encode")

        def digests() -> list[str]:
            return [base.autoencoder_digest(), base.text_encoder_digest()]

        # Hashing gigabytes is one rank's work.
        found = main_process_first(self.group, "digests", digests, self.stop)
        settings = self.settings
        if self.group.is_main:
            say_cut_captions(index, base.text_source)
        where = index, settings.work_dir, base, *found
        if isinstance(index, StreamedDataset):
            if everything:
                raise ConfigError("mode: streaming encodes nothing ahead; encode with mode: indexed, then stream that")
            encoded = StreamedClips(*where, max_bytes=settings.max_download_bytes)
            main_process_first(self.group, "first-clip", encoded.check_first, self.stop)
            return encoded
        encoded = EncodedClips(*where)
        if isinstance(index, LatentDataset):
            if settings.latents != "whole":
                raise ConfigError(
                    f"latents: {settings.latents} needs audio, and audio_data_url holds latents; choose whole"
                )
            encoded.take(index.latent_shards)
            return encoded
        if settings.latents != "whole":
            keep = settings.latents == "crop"
            encoded = EncodedCrops(*where, crop_frames=self.crop_frames(base, encoded), keep=keep)
        if everything and settings.latents == "on_the_fly":
            raise ConfigError("latents: on_the_fly leaves nothing to encode ahead; choose whole or crop")
        if settings.pre_encode if everything is None else everything:
            per_step = settings.batch_size * settings.accumulation(self.group.world_size) * self.group.world_size
            encode.encode_all(
                base,
                encoded,
                self.group,
                self.stop,
                order=self.micro_batches(base, encoded).order,
                slots=settings.number_of_steps * per_step,
                batch=settings.encode_batch,
            )
            if settings.latents == "whole":
                collect(encoded, self.group, self.stop)
            base.release_encoders()
        return encoded

    def prepare(self, base, encoded: EncodedClips) -> None:
        """Make the trainer: as the newest good checkpoint left it, or fresh."""
        self._enter("prepare")
        self.startup.begin("prepare")
        settings, group = self.settings, self.group
        self._frames = self.crop_frames(base, encoded)
        base_sha256 = main_process_first(group, "base-digest", base.weights_digest, self.stop)
        identity = resume.identity(
            settings,
            base_sha256=base_sha256,
            dataset_sha256=encoded.index.digest,
            lora_checkpoint_sha256=self._warm_start_sha256,
            lora_config=adapters.lora_config(base),
            crop_frames=self._frames,
        )
        streamed = isinstance(encoded, StreamedClips)
        if streamed:
            identity["shuffle_buffer"] = settings.shuffle_buffer
        saved = resume.find_checkpoint(settings, group, self.stop)
        if saved is not None:
            resume.check_identity(saved, identity, settings.output_dir)
            resume.check_course(saved, settings)
        stream = saved.state.get("stream") if saved else None
        places = LanePlaces.of(stream, group.dist_rank, group.world_size, max(1, settings.num_workers))
        accumulation = resume.divide_work(saved, settings, group.world_size)
        global_batch = accumulation * settings.batch_size * group.world_size
        work = RunPlan(
            steps=settings.number_of_steps,
            accumulation=accumulation,
            micro_batch=settings.batch_size,
            global_batch=global_batch,
            seed=settings.seed,
            identity=identity,
            clip_keys=[clip.key for clip in encoded.clips],
            order=None if streamed else self.micro_batches(base, encoded).order,
            schedule=lr_schedule.of_settings(settings),
            adapt_memory=settings.on_oom == "adapt",
            out_of_memory_at_step=resume.out_of_memory_at(saved, settings, self._out_of_memory_at_step),
            description=self._describe(encoded, identity, global_batch),
        )
        self.trainer = Trainer(base, adapters.adapter_parameters(base), settings, work, group)
        if saved is not None:
            self.trainer.restore(saved)
        check_same_start(group, self.trainer.step, base, self.trainer.engine.adapters())
        self.trainer.places = places if streamed else None
        self._saved_step = saved.step if saved else None

    def crop_frames(self, base, encoded: EncodedClips) -> int:
        # Without an index no clip is known, and ``duration`` is set.
        longest = max((clip.seconds for clip in encoded.clips), default=math.inf)
        framing = base.native_seconds, base.sample_rate_hz, base.samples_per_frame
        return crop_frames(self.settings.duration, longest, *framing)

    def train(self, base, encoded: EncodedClips) -> None:
        """Stage three: train from where ``prepare`` left the trainer to number_of_steps."""
        settings, group, work = self.settings, self.group, self.trainer.plan
        choose_acceleration(self.trainer, settings, self._frames)
        resume.set_aside(settings.output_dir, self.trainer.step, group, self.stop)
        self._announce(base)
        group.liveness.enter("train", settings.step_timeout)
        self.stop.holds_state = True
        if self.trainer.step < work.steps:
            # Closed on every way out: an unclosed loader leaves worker processes that the exit would wait for.
            with contextlib.closing(self._batches(base, encoded)) as batches:
                loop.train(
                    self.trainer,
                    batches,
                    self.stop,
                    settings.output_dir,
                    self._saved_step,
                    self.startup,
                )
        if self.trainer.places:
            seen = self.step * work.global_batch
            repeated = self.trainer.places.repeated
            log.info("streaming: %s trained on, %d of them repeated", counted(seen, "clip"), repeated)

    def micro_batches(self, base, encoded: EncodedClips) -> MicroBatches:
        """The seeded stream of this run's samples, by micro batch."""
        return MicroBatches(encoded, self._stream_settings(base, encoded))

    def _stream_settings(self, base, encoded: EncodedClips) -> StreamSettings:
        settings = self.settings
        return StreamSettings(
            seed=settings.seed,
            micro_batch=settings.batch_size,
            crop_frames=self.crop_frames(base, encoded),
            prompt_dropout=settings.prompt_dropout,
            seconds_total_of=settings.seconds_total_of,
            shift=base.config.distribution_shift,
            bucket_batches=settings.bucket_batches,
        )

    def _batches(self, base, encoded: EncodedClips) -> Generator[MicroBatch, None, None]:
        settings, group, work = self.settings, self.group, self.trainer.plan
        if isinstance(encoded, StreamedClips):
            yield from self._streamed_batches(base, encoded)
            return
        first = self.trainer.step + 1
        indices = micro_indices(first, work.steps, work.accumulation, group.dist_rank, group.world_size)
        batches = self.micro_batches(base, encoded)
        needed = base, encoded, batches.order, settings.batch_size, self._before_work, self._check_stop
        if isinstance(encoded, EncodedCrops):
            on_the_way = CropsInFlight(*needed)
            after = on_the_way.used
        else:
            on_the_way = encode.FirstUse(*needed)
            after = None
        with contextlib.closing(on_the_way.audio):
            ahead = on_the_way.audio.over(indices)
            yield from loader(batches, ahead, on_the_way.prepare, settings.num_workers, group.device, after)

    def _streamed_batches(self, base, encoded: StreamedClips) -> Generator[MicroBatch, None, None]:
        settings, trainer, stream = self.settings, self.trainer, self._stream_settings(base, encoded)
        done = trainer.step * trainer.plan.accumulation
        batches = StreamedBatches(encoded, stream, self.group, trainer.places.cursors, done, settings.shuffle_buffer)
        finish = finisher(base, encoded, stream, self._before_work)
        return streaming_loader(batches, finish, trainer.places, settings.num_workers, self.group.device)

    def _announce(self, base) -> None:
        settings, group, work = self.settings, self.group, self.trainer.plan
        if not group.is_main:
            return
        with atomic_path(settings.output_dir / "run.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False), encoding="utf-8")
        log.info(
            "training %s of %s (batch_size %d x %s x %d accumulated), crops of %.1f s%s%s",
            counted(work.steps, "step"),
            counted(work.global_batch, "clip"),
            work.micro_batch,
            counted(group.world_size, "process", "processes"),
            work.accumulation,
            self._frames * base.samples_per_frame / base.sample_rate_hz,
            f", recomputing {counted(base.recomputed_blocks, 'block')} to save memory"
            if base.recomputed_blocks
            else "",
            f", continuing after step {self._saved_step}" if self._saved_step else "",
        )

    def _public_settings(self) -> dict[str, Any]:
        # URLs may hold credentials, and these files are given away.
        urls = {key: getattr(self.settings, key) for key in ("audio_data_url", "lora_checkpoint_url")}
        return {**self.settings.as_dict(), **{key: redacted(url) for key, url in urls.items() if url}}

    def _before_work(self, doing: str) -> None:
        self.stop.raise_if_requested(doing)
        self.group.liveness.progress()

    def _check_stop(self) -> None:
        self.stop.raise_if_requested("reading audio")

    def _enter(self, stage: str) -> None:
        self.group.liveness.enter(stage, max(PREPARATION_SECONDS, self.settings.step_timeout))

    def _describe(self, encoded: EncodedClips, identity: dict[str, Any], global_batch: int) -> dict[str, Any]:
        """What config.json says, but for the step."""
        settings = self.settings
        return {
            "sa3dist_version": __version__,
            "base_model": settings.model,
            "base_sha256": identity["base_sha256"],
            "dataset_sha256": encoded.index.digest,
            "dataset_clips": len(encoded.clips) or None,
            "dataset_seconds": round(sum(clip.seconds for clip in encoded.clips), 3) or None,
            "skipped_clips": list(encoded.index.skipped),
            "effective_batch_size": global_batch,
            "world_size": self.group.world_size,
            "lora_config": identity["lora_config"],
            "config_sha256": digest_of(json.dumps(self._public_settings())),
            "settings": self._public_settings(),
        }

    def export(self, base) -> dict[str, Any]:
        """Stage four on rank 0: the adapter file, config.json and result.json. Returns the result."""
        self._enter("export")
        self.startup.begin("export")
        description = {**self.trainer.description(), "startup_seconds": self.startup.seconds}
        # On every rank: in some modes each of them holds a part.
        tensors = self.trainer.engine.adapters()

        def publish() -> dict[str, Any]:
            return export.publish(base.adapter_config, tensors, self.settings.output_dir, description)

        return main_process_first(self.group, "export", publish, stop=None)
