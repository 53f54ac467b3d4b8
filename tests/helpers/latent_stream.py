"""Streamed clips over shards of latents that tests write."""

from sa3dist.data.batches.shard_stream import ShardSource
from tests.helpers.latent_sets import ENCODERS


def source_of(paths, **changes):
    values = {"urls": tuple(map(str, paths)), "encoders": ENCODERS, "scratch": paths[0].parent, "max_bytes": 1 << 20}
    return ShardSource(**{**values, **changes})
