"""The training data as the stages see it: one ``BatchSource`` class per kind of data set, chosen in ``open_source``."""

from __future__ import annotations

import abc
import functools
import logging
import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from sa3dist.data.batches.encode_on_demand import EncodeOnDemand
from sa3dist.data.batches.loader import MicroBatches, micro_indices
from sa3dist.data.batches.micro_batch import MicroBatch, SampleSettings
from sa3dist.data.batches.order import ClipOrder
from sa3dist.data.batches.streaming import StreamedBatches, StreamedClips, encoder_of_decoded, streaming_loader
from sa3dist.data.batches.worker_shards import RankCursors
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.crops import EncodedCrops
from sa3dist.data.latents.encode_tasks import EncodeTask, caption_tasks, crop_task, whole_clip_tasks
from sa3dist.data.latents.source import LatentDataset, StreamedDataset
from sa3dist.errors import ConfigError, counted
from sa3dist.flow.crops import crop_frames
from sa3dist.formats import ClipEntry, DatasetIndex, dataset_digest
from sa3dist.model.base import Base

if TYPE_CHECKING:
    from sa3dist.runtime.process_group import Group
    from sa3dist.runtime.signals import StopRequest
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)


class BatchSource(abc.ABC):
    """A data set as one run uses it: with the run's base and settings.

    index           the clips to train on
    encoded         latents and prompt features of ``index``
    held_out        validation clips, sorted by key; may be empty
    held_encoded    latents and prompt features of ``held_out``: ``encoded``, unless validation is another data set
    draws           what samples depend on besides the clips
    order           the clip of each slot; None in streaming mode
    packs_latents   whether the encode stage packs latents into shards
    """

    order: ClipOrder | None = None
    packs_latents = False

    def __init__(
        self,
        settings: Settings,
        base: Base,
        index: DatasetIndex,
        digests: Sequence[str],
        held_out: Sequence[ClipEntry] = (),
        validation: DatasetIndex | None = None,
    ) -> None:
        """Arguments as in ``open_source``. Raises ConfigError or DataError if the settings do not fit the data set."""
        self.settings, self.base, self.index, self.held_out = settings, base, index, tuple(held_out)
        # A streamed data set has no index, and requires ``duration``.
        longest = max((clip.seconds for clip in index.clips), default=math.inf)
        framing = base.native_seconds, base.sample_rate_hz, base.samples_per_frame
        self.draws = SampleSettings(
            seed=settings.seed,
            micro_batch=settings.batch_size,
            crop_frames=crop_frames(settings.duration, longest, *framing),
            prompt_dropout=settings.prompt_dropout,
            seconds_total_of=settings.seconds_total_of,
            shift=base.config.distribution_shift,
            bucket_batches=settings.bucket_batches,
        )
        cache = settings.work_dir, base, *digests
        self.encoded = self.held_encoded = self._open(settings, self.draws, index, *cache)
        if validation is not None:
            self.held_encoded = source_class(validation, settings)._open(settings, self.draws, validation, *cache)

    @classmethod
    @abc.abstractmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *cache) -> EncodedClips:
        """The reader of a data set's latents. cache: work_dir, base and the digests of its encoders."""

    def check(self) -> None:  # noqa: B027 (most kinds have nothing to check)
        """Check, on rank 0, what only the first clip can show. Raises DataError or EnvironmentFailure."""

    def identity(self) -> dict[str, Any]:
        """What must equal the checkpoint's values to resume from it: JSON values by name."""
        # First, so that a changed split is reported as such, not as a changed data set.
        held_out = "none"
        if self.held_out:
            held_out = f"{counted(len(self.held_out), 'clip')} ({dataset_digest(self.held_out)[:16]})"
        return {
            "held_out": held_out,
            "dataset_sha256": self.index.digest,
            "crop_frames": self.draws.crop_frames,
        }

    def describe(self) -> dict[str, Any]:
        """The fields of config.json about the data set."""
        clips = self.index.clips
        return {
            "dataset_sha256": self.index.digest,
            "dataset_clips": len(clips) or None,
            "dataset_seconds": round(sum(clip.seconds for clip in clips), 3) or None,
            "skipped_clips": list(self.index.skipped),
            **({"held_out_clips": [clip.key for clip in self.held_out]} if self.held_out else {}),
        }

    @abc.abstractmethod
    def encode_tasks(self, slots: int) -> list[EncodeTask]:
        """The work of encoding ahead for the first ``slots`` slots. Raises ConfigError if nothing can be kept."""

    def cursors(self, saved: dict[str, Any] | None, dist_rank: int, world_size: int) -> RankCursors | None:
        """Where a stream continues. saved: the checkpoint's "stream". Raises CheckpointError if it does not fit."""
        return None

    @abc.abstractmethod
    def batches(
        self, steps: range, accumulation: int, group: Group, stop: StopRequest, cursors: RankCursors | None
    ) -> Generator[MicroBatch, None, None]:
        """This rank's micro batches for ``steps`` (from 1), in training order. The caller closes the generator.

        accumulation   micro batches per rank and step
        cursors        the result of ``cursors``; the trainer advances it
        Raises Interrupted, if asked to stop, before encoding a clip or while waiting for its audio.
        """

    def log_end(self, clips: int, cursors: RankCursors | None) -> None:  # noqa: B027 (most have nothing to say)
        """Log a summary at the end of training. clips: number of clips trained on, repeats included."""


class IndexedSource(BatchSource):
    """A data set with known clips: each is used once per epoch. ``micro_batches`` gives random access by index."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.micro_batches = MicroBatches(self.encoded, self.draws)
        self.order = self.micro_batches.order

    def batches(
        self, steps: range, accumulation: int, group: Group, stop: StopRequest, cursors: RankCursors | None
    ) -> Generator[MicroBatch, None, None]:
        indices = micro_indices(steps, accumulation, group.dist_rank, group.world_size)
        on_demand = EncodeOnDemand(
            self.base,
            self.micro_batches,
            before_work=functools.partial(_begin_work, group, stop),
            check_stop=functools.partial(stop.raise_if_requested, "reading audio"),
        )
        return on_demand.batches(indices, self.settings.num_workers, group.device)


class WholeSource(IndexedSource):
    """latents: whole. Whole clips are encoded, once per polarity; crops are cut from their latents."""

    packs_latents = True

    @classmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *cache) -> EncodedClips:
        return EncodedClips(index, *cache)

    def encode_tasks(self, slots: int) -> list[EncodeTask]:
        return whole_clip_tasks(self.encoded, self.settings.encode_batch)


class LatentSource(IndexedSource):
    """Latent shards as the data set: nothing is left to encode."""

    @classmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *cache) -> EncodedClips:
        if settings.latents != "whole":
            raise ConfigError(
                f"latents: {settings.latents} needs audio, and {index.directory} holds latents; choose whole"
            )
        encoded = EncodedClips(index, *cache)
        encoded.add_shards(index.latent_shards)
        return encoded

    def encode_tasks(self, slots: int) -> list[EncodeTask]:
        return []


class CropSource(IndexedSource):
    """latents: crop. Each crop is encoded separately and kept for later epochs and runs."""

    keep = True

    @classmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *cache) -> EncodedCrops:
        return EncodedCrops(index, *cache, crop_frames=draws.crop_frames, keep=cls.keep)

    def encode_tasks(self, slots: int) -> list[EncodeTask]:
        clips = (self.micro_batches.clip_of_slot(slot)[0] for slot in range(slots))
        crops = [crop_task(self.encoded, clip, self.settings.seed, slot) for slot, clip in enumerate(clips)]
        return caption_tasks(self.encoded, self.settings.encode_batch) + crops


class OnTheFlySource(CropSource):
    """latents: on_the_fly. Like CropSource, but a crop is encoded for every use, as in the reference."""

    keep = False

    def encode_tasks(self, slots: int) -> list[EncodeTask]:
        raise ConfigError("latents: on_the_fly leaves nothing to encode ahead; choose whole or crop")


class StreamSource(BatchSource):
    """mode: streaming. Shards of latents or audio are read sequentially, without an index; resumes at saved cursors."""

    @classmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *cache) -> StreamedClips:
        return StreamedClips(index, *cache, max_bytes=settings.max_download_bytes)

    def check(self) -> None:
        self.encoded.check_first()

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "shuffle_buffer": self.settings.shuffle_buffer}

    def encode_tasks(self, slots: int) -> list[EncodeTask]:
        raise ConfigError("mode: streaming encodes nothing ahead; encode with mode: indexed, then stream that")

    def cursors(self, saved: dict[str, Any] | None, dist_rank: int, world_size: int) -> RankCursors:
        return RankCursors.of(saved, dist_rank, world_size, max(1, self.settings.num_workers))

    def batches(
        self, steps: range, accumulation: int, group: Group, stop: StopRequest, cursors: RankCursors
    ) -> Generator[MicroBatch, None, None]:
        done = (steps.start - 1) * accumulation
        position = group.dist_rank, group.world_size, cursors.cursors, done, self.settings.shuffle_buffer
        batches = StreamedBatches(self.encoded, self.draws, *position)
        encode = encoder_of_decoded(self.base, self.encoded, self.draws, functools.partial(_begin_work, group, stop))
        return streaming_loader(batches, encode, cursors, self.settings.num_workers, group.device)

    def log_end(self, clips: int, cursors: RankCursors) -> None:
        log.info("streaming: %s trained on, %d of them repeated", counted(clips, "clip"), cursors.repeated)


def _begin_work(group: Group, stop: StopRequest, doing: str) -> None:
    stop.raise_if_requested(doing)
    group.liveness.progress()


# Shards are read by kind, audio as the setting ``latents`` says.
SOURCE_OF_INDEX = {StreamedDataset: StreamSource, LatentDataset: LatentSource}
SOURCE_OF_LATENTS = {"whole": WholeSource, "crop": CropSource, "on_the_fly": OnTheFlySource}


def source_class(index: DatasetIndex, settings: Settings) -> type[BatchSource]:
    return SOURCE_OF_INDEX.get(type(index)) or SOURCE_OF_LATENTS[settings.latents]


def open_source(
    settings: Settings,
    base: Base,
    index: DatasetIndex,
    digests: Sequence[str],
    held_out: Sequence[ClipEntry] = (),
    validation: DatasetIndex | None = None,
) -> BatchSource:
    """The batch source of the data set ``index`` with ``base``.

    digests      of the base's autoencoder and text encoder
    held_out     validation clips; not in ``index``
    validation   the data set of ``held_out``; None if they were split from the training data
    """
    return source_class(index, settings)(settings, base, index, digests, held_out, validation)
