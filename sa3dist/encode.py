"""Stage two: clips and captions become latents and prompt features on disk, divided over the ranks."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sa3dist.data.batches.batch_source import BatchSource, open_source
from sa3dist.data.batches.encode_on_demand import CLOSE_SECONDS, WAITING_BYTES
from sa3dist.data.latents.cache import SILENCE_TAIL_FRAMES, EncodedClips, frames_of
from sa3dist.data.latents.encode_tasks import EncodeTask
from sa3dist.data.latents.shards import LatentShard, latent_shard_name, write_latent_shard
from sa3dist.data.source.cut_captions import warn_of_cut_captions
from sa3dist.data.source.prefetch import prefetch
from sa3dist.data.source.shard_split import split
from sa3dist.errors import DataError, counted
from sa3dist.formats import DatasetIndex
from sa3dist.model.base import Base
from sa3dist.progress import progress
from sa3dist.runtime.file_lock import alone
from sa3dist.runtime.process_group import Group, main_process_first, run_on_all_ranks
from sa3dist.runtime.signals import StopRequest
from sa3dist.settings import Settings
from sa3dist.validation.fixed_set import FixedSet
from sa3dist.validation.split import hold_out

log = logging.getLogger(__name__)

# A quarter of an hour of audio: enough shards to divide among many ranks and workers, few enough to list.
MAX_LATENT_SHARD_BYTES = 64 << 20


def open_encoded(
    settings: Settings,
    base: Base,
    index: DatasetIndex,
    group: Group,
    stop: StopRequest,
    global_batch: int,
    everything: bool = False,
    validation: DatasetIndex | None = None,
) -> BatchSource:
    """The data set as ``base`` sees it; encoded now as far as possible with ``everything`` or ``pre_encode``.

    global_batch   clips per step over all ranks
    validation   the data set whose clips are held out, if they are not part of ``index``
    Raises what failed on any rank, on every rank; ConfigError when nothing can be encoded ahead.
    """
    # On rank 0 only: it hashes gigabytes.
    digests = main_process_first(
        group, "digests", lambda: [base.autoencoder_digest(), base.text_encoder_digest()], stop
    )
    if group.is_main:
        warn_of_cut_captions(index, base.text_source)
    index, held_out = hold_out(settings, index, group, stop, validation)
    source = open_source(settings, base, index, digests, held_out, validation)
    main_process_first(group, "first-clip", source.check, stop)
    if held_out and settings.validation_every:
        encode_all(base, FixedSet(source).encode_tasks(group.world_size), group, stop, "encode-held-out")
    if everything or settings.pre_encode:
        encode_all(base, source.encode_tasks(settings.number_of_steps * global_batch), group, stop)
        if source.packs_latents:
            pack_latents(source.encoded, group, stop)
        base.release_encoders()
    return source


def encode_all(base: Base, tasks: Sequence[EncodeTask], group: Group, stop: StopRequest, name: str = "encode") -> None:
    """Encode every task that is not on disk yet. name: unique per call within a run.

    Each rank takes every world_size-th task; all return together when the slowest is done. Which clips share a pass
    depends on the data set alone, not on the number of ranks or on what an earlier run has encoded.
    Raises what failed on any rank, on every rank.
    """
    mine = tasks[group.dist_rank :: group.world_size]
    left = [task for task in mine if task.is_missing()]
    total = sum(task.count for task in mine)
    held = total - sum(task.count for task in left)
    with progress(name.replace("-", " "), total, shown=group.is_main) as update:
        run_on_all_ranks(group, name, lambda: _encode(base, left, group, stop, held, update), stop)


def _encode(
    base: Base, left: Sequence[EncodeTask], group: Group, stop: StopRequest, held: int, update: Callable[..., None]
) -> None:
    begin, whole = time.monotonic(), sum(task.cost for task in left)
    done, cost = held, 0.0
    update(done, seconds_left=math.inf if left else 0.0)
    for task in left:
        task.begin()
    loaded = prefetch(
        lambda task: task.load(),
        left,
        lambda task: task.memory,
        num_workers=1,
        check_stop=lambda: stop.raise_if_requested("encoding"),
        in_flight_bytes=WAITING_BYTES,
        close_seconds=CLOSE_SECONDS,
    )
    with contextlib.closing(loaded):
        for task, value in loaded:
            group.liveness.progress()
            stop.raise_if_requested("encoding")
            task.encode(base, value)
            done, cost = done + task.count, cost + task.cost
            update(done, seconds_left=(time.monotonic() - begin) * (whole - cost) / cost)


def pack_latents(
    encoded: EncodedClips, group: Group, stop: StopRequest, max_shard_bytes: int = MAX_LATENT_SHARD_BYTES
) -> None:
    """Write the latent shards of a wholly encoded data set; they replace the files it was encoded into.

    Each rank writes every world_size-th shard; all return together. Existing shards stay. The files that a finished
    shard replaces are removed: a reader that does not know the shard yet finds it when the file is gone
    (``EncodedClips.member``).
    Raises what failed on any rank, on every rank.
    """
    # float32, with and without flipped polarity.
    frame_bytes = 8 * encoded.shards.encoders.latent_channels
    groups = list(
        split(
            encoded.clips,
            max_shard_bytes,
            lambda clip: frame_bytes * (frames_of(clip, encoded) + SILENCE_TAIL_FRAMES),
        )
    )

    def work() -> None:
        for number in range(group.dist_rank, len(groups), group.world_size):
            group.liveness.progress()
            stop.raise_if_requested("collecting latents")
            path = encoded.shards_dir / latent_shard_name(number)
            # Checked without the lock first: a complete work_dir may be read-only.
            if not _is_finished(path):
                # Two runs with one work_dir must not mix the index of one with the shard of the other.
                lock = path.with_name(f".{path.stem}.lock")
                with alone(lock, lambda: stop.raise_if_requested("collecting latents")):
                    if not _is_finished(path):
                        where = encoded.index.digest, number, len(groups)
                        write_latent_shard(path, groups[number], encoded.shards.encoders, *where, encoded.member)
            for clip in groups[number]:
                loose = (encoded.latents_path(clip, False), encoded.latents_path(clip, True))
                for path in (*loose, encoded.prompt_path(clip.caption)):
                    if path.exists():
                        path.unlink(missing_ok=True)

    run_on_all_ranks(group, "collect", work, stop)
    log.info("latents: %s in %s", counted(len(groups), "shard"), encoded.shards_dir)
    encoded.shards.load(encoded.shards_dir)


def _is_finished(path: Path) -> bool:
    with contextlib.suppress(DataError):
        return LatentShard.read(path) is not None
    return False
