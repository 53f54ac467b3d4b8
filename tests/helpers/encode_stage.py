"""The encode stage run whole, by one process or a group of them."""

import torch

from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.encode_tasks import whole_clip_tasks
from sa3dist.encode import encode_all, pack_latents
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest

ALONE = Group(0, 1, torch.device("cpu"))


def encode_everything(base, index, work_dir, group=ALONE):
    encoded = EncodedClips(index, work_dir, base, "a", "t")
    encode_all(base, whole_clip_tasks(encoded), group, StopRequest())
    # Three shards.
    pack_latents(encoded, group, StopRequest(), max_shard_bytes=30_000)
    return encoded
