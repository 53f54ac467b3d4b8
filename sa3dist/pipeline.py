"""One run: the settings, the processes, and each stage with what it needs from the ones before."""

import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any

from sa3dist import adapters, encode, export, loop, shard
from sa3dist.data.batches.batch_source import BatchSource
from sa3dist.data.batches.worker_shards import RankCursors
from sa3dist.data.source.build import Measure
from sa3dist.errors import CheckpointError, ConfigError
from sa3dist.formats import DatasetIndex, write_whole
from sa3dist.listening import previews, watching
from sa3dist.model.base import Base
from sa3dist.parallel import zero_config
from sa3dist.runtime.liveness import PREPARATION_SECONDS
from sa3dist.runtime.process_group import Group, main_process_first
from sa3dist.runtime.signals import StopRequest
from sa3dist.settings import Settings
from sa3dist.tracking import kinds as trackers
from sa3dist.training import checkpoint, model_setup, resume, run_plan
from sa3dist.training.acceleration import check_choices, choose_acceleration
from sa3dist.training.compile_ahead import CompilingAhead
from sa3dist.training.compile_processes import Compiling, end_all
from sa3dist.training.observers import Observer
from sa3dist.training.rank_checks import check_same_start
from sa3dist.training.startup_times import Startup
from sa3dist.training.trainer import Trainer
from sa3dist.validation.split import settings_file

log = logging.getLogger(__name__)


class Run:
    """The stages in the order they are called: open_base, shard, encode, prepare, train, export."""

    def __init__(
        self,
        settings: Settings,
        group: Group,
        stop: StopRequest,
        out_of_memory_at_step: int | None = None,
        started: dict[str, Compiling] | None = None,
    ) -> None:
        """out_of_memory_at_step: where the start before ran out of memory, as its status.json notes it.

        started   processes that can compile ahead; those that are needed are taken out
        """
        self.settings = settings
        self.group = group
        self.stop = stop
        self.trainer: Trainer | None = None
        self._warm_start_sha256: str | None = None
        self._saved: checkpoint.Checkpoint | None = None
        self._saved_step: int | None = None
        self._ended_early = ""
        self._observers: list[Observer] = []
        self._validation: DatasetIndex | None = None
        self._cursors: RankCursors | None = None
        self._compiling: CompilingAhead | None = None
        self._started = {} if started is None else started
        self.startup = Startup()
        self._out_of_memory_at_step = out_of_memory_at_step

    @property
    def step(self) -> int:
        return self.trainer.step if self.trainer else self._saved_step or 0

    def check(self) -> None:
        """Refuse at once what can be refused without preparation, and find the checkpoint to continue from.

        Runs that train call it first. Raises ConfigError, DataError, CheckpointError.
        """
        settings = self.settings
        for key, path in (("output_dir", settings.output_dir), ("work_dir", settings.work_dir)):
            if path.is_symlink() and not path.exists():
                raise ConfigError(f"{key}: {path} is a link to {path.readlink()}, which is not there; make that first")
            if path.exists() and not path.is_dir():
                raise ConfigError(f"{key}: {path} is a file, expected a directory; choose another {key}")
        # On rank 0 only: other hosts need not have the files.
        main_process_first(self.group, "find-source", lambda: shard.check_sources(settings), self.stop)
        # On rank 0 only: other hosts need not have the trackers installed.
        main_process_first(self.group, "load-trackers", lambda: trackers.load(settings.log_with), self.stop)
        if self.group.deepspeed is not None:
            zero_config.check(self.group.deepspeed)
        check_choices(settings, self.group)
        self._saved = resume.find(settings, self.group, self.stop)
        self._saved_step = self._saved and self._saved.step

    def begin_compiling(self) -> None:
        """Start compiling a GPU's programs in the background of the next stages."""
        if self.group.device.type == "cuda":
            self._compiling = model_setup.begin_compiling(self.settings, self.group, self._started)
        end_all(self._started)

    def open_base(self) -> Base:
        """The frozen base with fresh adapters, started from lora_checkpoint_url unless the run continues.

        Comes first, so that a wrong model, rank, include list or adapter file is refused before hours of preparation.
        If one rank fails, all ranks raise its error.
        """
        self._enter("base")
        known = self._saved and resume.warm_start_of(self._saved, self.settings)
        opened = model_setup.open_base(self.settings, self.group, self.stop, self.startup, known)
        base, self._warm_start_sha256 = opened
        previews.check(self.settings, base.config)
        return base

    def shard(self, measure: Measure | None = None) -> DatasetIndex:
        """Stage one on rank 0; every rank reads the index it writes. Latent shards skip this stage.

        measure   as in ``build_shards``
        """
        self._enter("shard", "check_clips")
        index = shard.open_dataset(self.settings, self.group, self.stop, measure)
        self._validation = shard.open_validation(self.settings, self.group, self.stop)
        return index

    def encode(self, base: Base, index: DatasetIndex, everything: bool = False) -> BatchSource:
        """Stage two. everything: encode all clips now, whatever ``pre_encode`` says."""
        self._enter("encode", "encode")
        settings, group = self.settings, self.group
        accumulation = resume.accumulation_of(self._saved, settings, group.world_size)
        global_batch = accumulation * settings.batch_size * group.world_size
        return encode.open_encoded(settings, base, index, group, self.stop, global_batch, everything, self._validation)

    def prepare(self, base: Base, source: BatchSource) -> None:
        """Make the trainer, fresh or restored from the newest good checkpoint."""
        self._enter("prepare", "prepare")
        settings, group = self.settings, self.group
        base_sha256 = main_process_first(group, "base-digest", base.weights_digest, self.stop)
        identity = resume.identity(
            settings,
            base_sha256=base_sha256,
            **source.identity(),
            **{resume.WARM_START: self._warm_start_sha256},
            lora_config=adapters.lora_config(base),
        )
        # Not kept: the trainer copies its tensors.
        saved, self._saved = self._saved, None
        if saved is not None:
            resume.check_identity(saved, identity, settings)
        self._cursors = source.cursors(saved and saved.state.get("stream"), group.dist_rank, group.world_size)
        plan = run_plan.make(settings, source, identity, saved, group.world_size, self._out_of_memory_at_step)
        if self._compiling is not None:
            self._compiling.wait(group, self.stop, self.startup)
        self.trainer = Trainer(base, adapters.adapter_parameters(base), settings, plan, group, self._cursors)
        if saved is not None:
            self.trainer.restore(saved)
        check_same_start(group, self.trainer.step, base, self.trainer.engine.adapters())

    def train(self, base: Base, source: BatchSource) -> None:
        """Stage three: train from where ``prepare`` left the trainer to number_of_steps."""
        settings, group, plan = self.settings, self.group, self.trainer.plan
        self.startup.begin("acceleration")
        choose_acceleration(self.trainer, settings, source.draws.crop_frames)
        resume.set_aside(settings.output_dir, self.trainer.step, group, self.stop)
        self._announce(base, source)
        group.liveness.enter("train", settings.step_timeout)
        self._observers = watching.observers_of(self.trainer, base, source)
        if self.trainer.step < plan.steps:
            # Always close it: an unclosed loader leaves worker processes that the exit would wait for.
            steps = range(self.step + 1, plan.steps + 1)
            micro_batches = source.batches(steps, plan.accumulation, group, self.stop, self._cursors)
            with contextlib.closing(micro_batches) as batches:
                self._ended_early = loop.train(
                    self.trainer,
                    batches,
                    self.stop,
                    settings.output_dir,
                    resumed_from=self._saved_step,
                    startup=self.startup,
                    observers=self._observers,
                )
        source.log_end(self.step * plan.global_batch, self._cursors)

    def _announce(self, base: Base, source: BatchSource) -> None:
        settings, group, plan = self.settings, self.group, self.trainer.plan
        if not group.is_main:
            return
        write_whole(settings.output_dir / "run.yaml", settings_file(settings, source.held_out))
        crop_seconds = source.draws.crop_frames * base.samples_per_frame / base.sample_rate_hz
        log.info(plan.summary(group.world_size, crop_seconds, base.recomputed_blocks, self._saved_step))

    def _enter(self, stage: str, part: str | None = None) -> None:
        """part: which part of the start begins with this stage; None where the stage reports its own parts."""
        if part is not None:
            self.startup.begin(part)
        self.group.liveness.enter(stage, max(PREPARATION_SECONDS, self.settings.step_timeout))

    def export(self, base: Base) -> None:
        """Stage four on rank 0: the adapter file, config.json and result.json."""
        self._enter("export", "export")
        description = {**self.trainer.description(), "startup_seconds": self.startup.seconds}
        # On every rank: in some modes each rank holds only a part.
        tensors = self.trainer.engine.adapters()
        output_dir, config = self.settings.output_dir, base.adapter_config
        self._publish(lambda: export.publish(config, tensors, output_dir, description, self._ended_early))

    def export_saved(self) -> None:
        """Stage four from a checkpoint alone, the one a run would continue from; its model and data may be gone."""
        self._enter("export")
        settings = self.settings

        def publish() -> dict[str, Any]:
            saved = checkpoint.find(settings.output_dir, "auto" if settings.resume == "never" else settings.resume)
            if saved is None:
                raise CheckpointError(f"{settings.output_dir}: no checkpoint to export; run sa3dist loop first")
            self._saved_step = saved.step
            return export.publish_saved(saved, settings.output_dir)

        self._publish(publish)

    def on_exit(self) -> None:
        """Tell the observers that the run's last files are on disk."""
        for observer in self._observers:
            observer.on_exit()

    def _publish(self, publish: Callable[[], dict[str, Any]]) -> None:
        """Make the result on rank 0 and print it as the last line of stdout."""
        result = main_process_first(self.group, "export", publish, stop=None)
        if self.group.is_main:
            print(json.dumps(result), flush=True)
