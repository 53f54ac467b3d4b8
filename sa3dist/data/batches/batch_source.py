"""What a run trains on, as the stages see it: one class per kind of data set, chosen once, in ``open_source``."""

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
from sa3dist.data.batches.streaming import StreamedBatches, StreamedClips, finisher, streaming_loader
from sa3dist.data.batches.worker_shards import RankCursors
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.crops import EncodedCrops
from sa3dist.data.latents.pieces import Piece, caption_pieces, crop_piece, whole_pieces
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
    """A data set under one base, read as one run's settings say.

    index           the clips to train on
    encoded         their latents and prompt features
    held_out        clips kept for validation, sorted by key; empty if none
    held_encoded    latents and prompt features of these: the same object as ``encoded`` unless they are a separate data
                    set
    draws           everything else that samples depend on
    order           which clip each slot trains on; None where a stream decides
    packs_latents   whether latents encoded ahead are packed into latent shards
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
        """Arguments as for ``open_source``. Raises ConfigError or DataError if the settings do not fit the data."""
        self.settings, self.base, self.index, self.held_out = settings, base, index, tuple(held_out)
        # A stream has no index, so the longest clip is unknown; ``duration`` is set there.
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
        where = settings.work_dir, base, *digests
        self.encoded = self.held_encoded = self._open(settings, self.draws, index, *where)
        if validation is not None:
            self.held_encoded = kind_of(validation, settings)._open(settings, self.draws, validation, *where)

    @classmethod
    @abc.abstractmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *where) -> EncodedClips:
        """The reader of a data set's latents. where: work_dir, base and the digests of its encoders."""

    def check(self) -> None:  # noqa: B027 (most kinds have nothing to check)
        """On rank 0, refuse at once what only the first clip shows. Raises DataError or EnvironmentFailure."""

    def identity(self) -> dict[str, Any]:
        """JSON values by name that a checkpoint must share to be continued on this data set."""
        # First in the dict, so that the error for another split names the split.
        held_out = "none"
        if self.held_out:
            held_out = f"{counted(len(self.held_out), 'clip')} ({dataset_digest(self.held_out)[:16]})"
        return {
            "held_out": held_out,
            "dataset_sha256": self.index.digest,
            "crop_frames": self.draws.crop_frames,
        }

    def describe(self) -> dict[str, Any]:
        """What config.json says about the data set."""
        clips = self.index.clips
        return {
            "dataset_sha256": self.index.digest,
            "dataset_clips": len(clips) or None,
            "dataset_seconds": round(sum(clip.seconds for clip in clips), 3) or None,
            "skipped_clips": list(self.index.skipped),
            **({"held_out_clips": [clip.key for clip in self.held_out]} if self.held_out else {}),
        }

    @abc.abstractmethod
    def pieces(self, slots: int) -> list[Piece]:
        """What to encode ahead for the first ``slots`` slots. Raises ConfigError if this kind encodes nothing ahead."""

    def cursors(self, saved: dict[str, Any] | None, dist_rank: int, world_size: int) -> RankCursors | None:
        """Where a stream continues. saved: the checkpoint's "stream". Raises CheckpointError when it does not fit."""
        return None

    @abc.abstractmethod
    def batches(
        self, steps: range, accumulation: int, group: Group, stop: StopRequest, cursors: RankCursors | None
    ) -> Generator[MicroBatch, None, None]:
        """This rank's micro batches of ``steps``, counted from 1, in training order. The caller closes the generator.

        accumulation   micro batches per rank and step
        cursors        from ``cursors``; the training keeps it up to date
        Raises Interrupted when asked to stop, before a clip is encoded or while waiting for its audio.
        """

    def say_end(self, clips: int, cursors: RankCursors | None) -> None:  # noqa: B027 (most have nothing to say)
        """Log what is known at the end of the training. clips: number trained on, repeats included."""


class IndexedSource(BatchSource):
    """Clips known by an index, each once per epoch. ``micro_batches`` gives any micro batch by its number."""

    def __init__(self, *where) -> None:
        super().__init__(*where)
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
    """latents: whole. Each clip is encoded whole, once per polarity; crops are cut from the latents."""

    packs_latents = True

    @classmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *where) -> EncodedClips:
        return EncodedClips(index, *where)

    def pieces(self, slots: int) -> list[Piece]:
        return whole_pieces(self.encoded, self.settings.encode_batch)


class LatentSource(IndexedSource):
    """Latent shards as the data set: everything is encoded already."""

    @classmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *where) -> EncodedClips:
        if settings.latents != "whole":
            raise ConfigError(
                f"latents: {settings.latents} needs audio, and {index.directory} holds latents; choose whole"
            )
        encoded = EncodedClips(index, *where)
        encoded.take(index.latent_shards)
        return encoded

    def pieces(self, slots: int) -> list[Piece]:
        return []


class CropSource(IndexedSource):
    """latents: crop. Each crop is encoded by itself and kept for later epochs and runs."""

    keep = True

    @classmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *where) -> EncodedCrops:
        return EncodedCrops(index, *where, crop_frames=draws.crop_frames, keep=cls.keep)

    def pieces(self, slots: int) -> list[Piece]:
        clips = (self.micro_batches.clip_of_slot(slot)[0] for slot in range(slots))
        crops = [crop_piece(self.encoded, clip, self.settings.seed, slot) for slot, clip in enumerate(clips)]
        return caption_pieces(self.encoded, self.settings.encode_batch) + crops


class OnTheFlySource(CropSource):
    """latents: on_the_fly. As CropSource, but a crop is deleted after its use, as in the reference."""

    keep = False

    def pieces(self, slots: int) -> list[Piece]:
        raise ConfigError("latents: on_the_fly leaves nothing to encode ahead; choose whole or crop")


class StreamSource(BatchSource):
    """mode: streaming. Shards of latents or audio without an index, continued from a checkpoint's cursors."""

    @classmethod
    def _open(cls, settings: Settings, draws: SampleSettings, index: DatasetIndex, *where) -> StreamedClips:
        return StreamedClips(index, *where, max_bytes=settings.max_download_bytes)

    def check(self) -> None:
        self.encoded.check_first()

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "shuffle_buffer": self.settings.shuffle_buffer}

    def pieces(self, slots: int) -> list[Piece]:
        raise ConfigError("mode: streaming encodes nothing ahead; encode with mode: indexed, then stream that")

    def cursors(self, saved: dict[str, Any] | None, dist_rank: int, world_size: int) -> RankCursors:
        return RankCursors.of(saved, dist_rank, world_size, max(1, self.settings.num_workers))

    def batches(
        self, steps: range, accumulation: int, group: Group, stop: StopRequest, cursors: RankCursors
    ) -> Generator[MicroBatch, None, None]:
        done = (steps.start - 1) * accumulation
        where = group.dist_rank, group.world_size, cursors.cursors, done, self.settings.shuffle_buffer
        batches = StreamedBatches(self.encoded, self.draws, *where)
        finish = finisher(self.base, self.encoded, self.draws, functools.partial(_begin_work, group, stop))
        return streaming_loader(batches, finish, cursors, self.settings.num_workers, group.device)

    def say_end(self, clips: int, cursors: RankCursors) -> None:
        log.info("streaming: %s trained on, %d of them repeated", counted(clips, "clip"), cursors.repeated)


def _begin_work(group: Group, stop: StopRequest, doing: str) -> None:
    stop.raise_if_requested(doing)
    group.liveness.progress()


# Chosen by what ``audio_data_url`` holds; for audio, by the setting ``latents``.
OF_INDEX = {StreamedDataset: StreamSource, LatentDataset: LatentSource}
OF_LATENTS = {"whole": WholeSource, "crop": CropSource, "on_the_fly": OnTheFlySource}


def kind_of(index: DatasetIndex, settings: Settings) -> type[BatchSource]:
    return OF_INDEX.get(type(index)) or OF_LATENTS[settings.latents]


def open_source(
    settings: Settings,
    base: Base,
    index: DatasetIndex,
    digests: Sequence[str],
    held_out: Sequence[ClipEntry] = (),
    validation: DatasetIndex | None = None,
) -> BatchSource:
    """The data set in ``index`` under ``base``.

    digests      of the base's autoencoder and text encoder
    held_out     clips that are not trained on and not in ``index``
    validation   the data set they come from, if it is separate
    """
    return kind_of(index, settings)(settings, base, index, digests, held_out, validation)
