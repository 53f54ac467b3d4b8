"""Made-up latent shards without a model: every clip's latents tell which clip, polarity and frame they are."""

import hashlib

import torch

from sa3dist.data.latents.shards import FLIPPED, PROMPT, Encoders, latent_shard_name, write_latent_shard
from sa3dist.data.latents.tensor_files import pack_tensors
from sa3dist.formats import ClipEntry

CHANNELS, FRAME, RATE, TOKENS = 3, 4096, 44100, 8
ENCODERS = Encoders("1", "a", "t", RATE, FRAME, CHANNELS, TOKENS)


class Framing:
    """What EncodedClips asks of a base."""

    sample_rate_hz, samples_per_frame, latent_channels, prompt_tokens = RATE, FRAME, CHANNELS, TOKENS


def clip(number, frames=6):
    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    # Every other clip shares its caption with the next one.
    return ClipEntry(f"clip {number:02d}", "", 0, 1, sha256, "wav", frames * FRAME - 5, RATE, 2, f"c {number // 2}")


def content(entry, kind):
    number = float(entry.key.split()[1])
    if kind == PROMPT:
        return pack_tensors({"hidden": torch.full((3, 2), float(entry.caption.split()[1]))})
    frames = -(-entry.samples // FRAME)
    latents = torch.full((CHANNELS, frames + 4), -number if kind == FLIPPED else number)
    latents[1] = torch.arange(frames + 4)
    return pack_tensors({"latents": latents, "silence": torch.zeros(CHANNELS, 2), "peaks": torch.ones(frames)})


def write_set(folder, sizes, encoders=ENCODERS):
    """Shards of the given numbers of clips; returns their paths."""
    paths, begin = [], 0
    for number, size in enumerate(sizes):
        clips = [clip(n) for n in range(begin, begin + size)]
        paths.append(folder / latent_shard_name(number))
        write_latent_shard(paths[-1], clips, encoders, "made up", number, len(sizes), content)
        begin += size
    return paths
