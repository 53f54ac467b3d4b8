"""Peak memory of encoding one clip, by its length: what `sa3dist encode` needs beyond the loaded base.

    python tests/survival/encode_memory.py BASE [--seconds 12,95,380] [--batch 1]

BASE is a base's directory, or medium or small: the released autoencoder at its full width, with random weights.
Each length in a process of its own; megabytes of resident memory above what the process held after a first short clip.
One JSON object on stdout.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import soundfile
import torch

RATE = 44100


def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def full_width(directory, shape):
    """A base whose autoencoder has the released shape; its DiT is narrow, because encoding does not run it."""
    from sa3dist.model.released import released_config
    from sa3dist.model.tiny import tiny_config, write_random_base

    released = released_config(f"{shape}-base" if shape == "medium" else f"{shape}-music-base", 2)["model"]
    value = tiny_config(shape, 2)
    channels = released["io_channels"]
    value["model"] |= {"pretransform": released["pretransform"], "io_channels": channels}
    value["model"]["diffusion"]["config"] |= {"io_channels": channels, "local_add_cond_dim": channels + 1}
    return write_random_base(directory, value, 0)


def dataset(work, seconds):
    """Index of one clip."""
    from sa3dist.data.source.build import build_shards

    rng = np.random.default_rng(0)
    audio_NC = (rng.standard_normal((int(seconds * RATE), 2)) * 0.1).astype(np.float32)
    with zipfile.ZipFile(work / "clips.zip", "w") as archive:
        out = io.BytesIO()
        soundfile.write(out, audio_NC, RATE, format="FLAC")
        archive.writestr("noise.flac", out.getvalue())
        archive.writestr("noise.txt", "noise")
    return build_shards(str(work / "clips.zip"), work / "work", allow_any_dataset_size=True, num_workers=1)


def encode(base, directory, work, batch):
    from sa3dist.data.latents.cache import EncodedClips
    from sa3dist.data.latents.encode_tasks import whole_clip_tasks
    from sa3dist.encode import encode_all
    from sa3dist.formats import DatasetIndex
    from sa3dist.runtime.process_group import Group
    from sa3dist.runtime.signals import StopRequest

    encoded = EncodedClips(DatasetIndex.read(directory), work, base, "a", "t")
    encode_all(base, whole_clip_tasks(encoded, batch), Group(0, 1, torch.device("cpu")), StopRequest())


def one(base_dir, directory, short_directory, work, batch):
    from sa3dist.model.loading import load_base

    base = load_base(base_dir)
    encode(base, short_directory, work / "short", batch)
    before = megabytes()
    encode(base, directory, work / "long", batch)
    print(round(megabytes() - before))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--seconds", default="12,95,380")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        directory, short, work = map(Path, chosen.one)
        one(chosen.base, directory, short, work, chosen.batch)
        return
    grown = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        base = chosen.base
        if base in ("medium", "small"):
            base = str(full_width(work / "base", base))
        (work / "short").mkdir()
        short = dataset(work / "short", 1.0)
        for seconds in map(float, chosen.seconds.split(",")):
            place = work / f"{seconds:g}"
            place.mkdir()
            index = dataset(place, seconds)
            command = [sys.executable, __file__, base, "--batch", str(chosen.batch), "--one"]
            command += [str(index.directory), str(short.directory), str(place)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            grown[f"{seconds:g} s"] = int(out)
    print(json.dumps({"batch": chosen.batch, "grown_mb": grown}))


if __name__ == "__main__":
    main()
