"""Encoded clips collected into latent shards, which then take the place of the files they were encoded into."""

from __future__ import annotations

import logging
from pathlib import Path

from sa3dist.data.latents.cache import SILENCE_TAIL_FRAMES, EncodedClips, frames_of
from sa3dist.data.latents.shards import LatentShard, index_path, latent_shard_name, write_latent_shard
from sa3dist.data.source.shard_split import split
from sa3dist.errors import DataError, counted
from sa3dist.formats import ClipEntry
from sa3dist.runtime.file_lock import alone
from sa3dist.runtime.process_group import Group, run_on_all_ranks
from sa3dist.runtime.signals import StopRequest

log = logging.getLogger(__name__)

# A quarter of an hour of audio: enough shards to share out among many ranks and workers, few enough to list.
MAX_LATENT_SHARD_BYTES = 64 << 20


def collect(
    encoded: EncodedClips, group: Group, stop: StopRequest, max_shard_bytes: int = MAX_LATENT_SHARD_BYTES
) -> None:
    """Write the shards of a wholly encoded data set; each rank writes every world_size-th and all return together.

    A shard that is there already stays. What a finished shard holds is removed where it lay before: a reader that has
    not heard of the shard finds it when the file is gone (``EncodedClips.content``).
    Raises what failed on any rank, on every rank.
    """
    groups = list(split(encoded.clips, max_shard_bytes, lambda clip: _latent_bytes(clip, encoded)))

    def work() -> None:
        for number in range(group.dist_rank, len(groups), group.world_size):
            group.liveness.progress()
            stop.raise_if_requested("collecting latents")
            path = encoded.shards_dir / latent_shard_name(number)
            # Of two runs on one work_dir the index of the one must not meet the shard of the other.
            lock = path.with_name(f".{path.stem}.lock")
            with alone(lock, lambda: stop.raise_if_requested("collecting latents")):
                if not _is_finished(path):
                    where = encoded.index.digest, number, len(groups)
                    write_latent_shard(path, groups[number], encoded.shards.encoders, *where, encoded.member)
            _remove_files(encoded, groups[number])

    run_on_all_ranks(group, "collect", work, stop)
    log.info("latents: %s in %s", counted(len(groups), "shard"), encoded.shards_dir)
    encoded.shards.load(encoded.shards_dir)


def _latent_bytes(clip: ClipEntry, encoded: EncodedClips) -> int:
    frames = frames_of(clip, encoded) + SILENCE_TAIL_FRAMES
    return 2 * frames * encoded.shards.encoders.latent_channels * 4


def _is_finished(path: Path) -> bool:
    if not index_path(path).exists():
        return False
    try:
        LatentShard.read(path)
    except DataError:
        return False
    return True


def _remove_files(encoded: EncodedClips, clips: list[ClipEntry]) -> None:
    for clip in clips:
        for flipped in (False, True):
            encoded.latents_path(clip, flipped).unlink(missing_ok=True)
        encoded.prompt_path(clip.caption).unlink(missing_ok=True)
