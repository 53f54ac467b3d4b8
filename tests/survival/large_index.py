"""What an index of 100,000 clips costs in seconds and megabytes: reading, an epoch's order, the first batch.

    python tests/survival/large_index.py [--clips 100000] [--work DIR]

Wall clock and processor time after imports; one JSON object on stdout.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from sa3dist.data.batches.encode_on_demand import EncodeOnDemand
from sa3dist.data.batches.loader import MicroBatches
from sa3dist.data.batches.micro_batch import SampleSettings
from sa3dist.data.batches.order import clip_order
from sa3dist.data.latents import cache
from sa3dist.data.latents.tensor_files import write_tensors
from sa3dist.flow.crops import polarity_of_slot
from sa3dist.formats import ClipEntry, DatasetIndex

WINDOW = 8


class Base:
    sample_rate_hz, samples_per_frame, latent_channels, prompt_tokens = 44100, 4096, 8, 128


def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Timed:
    """Seconds of a block by the wall and of this process's processor time, and the megabytes its peak grew by."""

    def __enter__(self):
        self.begin, self.cpu_begin, self.before = time.perf_counter(), time.process_time(), megabytes()
        return self

    def __exit__(self, *_):
        self.seconds, self.cpu_seconds = time.perf_counter() - self.begin, time.process_time() - self.cpu_begin
        self.grown = megabytes() - self.before

    def figures(self):
        values = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "grown_mb": self.grown}
        return {name: round(value, 3) for name, value in values.items()}


def write_index(work, count):
    clips = tuple(
        ClipEntry(
            f"c/{i:06d}", f"s-{i // 500}.tar", 512, 9000, f"{i:064x}", "wav", 44100 * (3 + i % 20), 44100, 2, f"c {i}"
        )
        for i in range(count)
    )
    index = DatasetIndex(work, "0" * 64, clips)
    index.write()
    return index


def stream_of(index):
    encoded = cache.EncodedClips(index, index.directory, Base, "a", "b")
    return encoded, MicroBatches(encoded, SampleSettings(3, 2, 129, 0.1, "file", None, WINDOW))


def write_first_latents(index, slots):
    """What the first batches need, and no more: the rest of the data set is its index."""
    encoded, batches = stream_of(index)
    for slot in range(slots):
        clip, flipped = encoded.clips[batches.order.clip_of_slot(slot)], polarity_of_slot(3, slot)
        frames = clip.samples // 4096 + 1
        tensors = {"latents": torch.randn(8, frames + 32), "silence": torch.randn(8, 2), "peaks": torch.ones(frames)}
        write_tensors(encoded.latents_path(clip, flipped), tensors)
        write_tensors(encoded.prompt_path(clip.caption), {"hidden": torch.randn(7, 16)})


def measure(work, count):
    report = {"clips": count}
    lengths = torch.randint(1, 4000, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.randperm(10)
    with Timed() as order_time:
        for window in (1, 64):
            order = clip_order(1, lengths, 4, window)
            picked = [order.clip_of_slot(slot) for slot in range(0, count, 100)]
            assert len(set(order.epoch(0).tolist())) == count
            assert len(set(picked)) == len(picked)
    report["order_of_two_epochs"] = order_time.figures()
    write_first_latents(write_index(work, count), 16)
    with Timed() as read_time:
        DatasetIndex.read(work)
    report["read_index"] = read_time.figures()
    with Timed() as first_time:
        _, batches = stream_of(DatasetIndex.read(work))
        source = EncodeOnDemand(Base, batches).batches(range(4), 1, torch.device("cpu"))
        first = next(source)
    assert len(first.clips) == 2
    source.close()
    report["first_batch"] = first_time.figures()
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--work", type=Path, help="where the index is written; default: a temporary folder")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(chosen.work or Path(name), chosen.clips)))
