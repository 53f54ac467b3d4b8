"""Samples per second of our loader, a plain webdataset pipeline and a plain PyTorch folder dataset, on the same files.

    python kernels/benchmarks/bench_loader.py [--clips 64] [--seconds 12] [--workers 1,2] [--rounds 7] [--out FILE.json]

audio    decode each clip and cut or pad it to the crop; ours reads from the shard by offset and checks the digest
latents  read each clip's latents and cut them; ours from latent shards with a digest check, webdataset from a tar of
         .npy; the folder dataset, which stores none, decodes the audio
ours     whole training samples: latents, prompt, noise, masks, coupling and target

The others use only soundfile, torch and webdataset, without checks, as a newcomer would write them. No model is needed:
latents are random, of the released shape (256 x frames). Workers persist between passes, as in a long run. Passes of
all variants are timed in turn, in random order, so that a busy machine slows all alike. With 0 workers the figure is
samples per second of processor time, which other processes hardly affect.
"""

import argparse
import io
import json
import math
import random
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset

from sa3dist.data.batches.loader import MicroBatches
from sa3dist.data.batches.micro_batch import SampleSettings
from sa3dist.data.latents.cache import SILENCE_TAIL_FRAMES, EncodedClips
from sa3dist.data.latents.tensor_files import write_tensors
from sa3dist.data.source.audio import load_clip_audio
from sa3dist.data.source.build import build_shards
from sa3dist.encode import pack_latents
from sa3dist.formats import write_json
from sa3dist.model.config import ShiftConfig
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest

RATE, FRAME, CHANNELS, TOKENS = 44100, 4096, 256, 256


class Framing:
    sample_rate_hz, samples_per_frame, latent_channels, prompt_tokens = RATE, FRAME, CHANNELS, TOKENS


class FolderAudio(Dataset):
    """A plain dataset: a list of files, decoded on access."""

    def __init__(self, folder, crop_samples):
        self.paths, self.crop_samples = sorted(folder.glob("*.flac")), crop_samples

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        return fitted(self.paths[number].read_bytes(), self.crop_samples)


class IndexedAudio(Dataset):
    """Our audio reader, as used by the encode stage, with the same cut."""

    def __init__(self, index, crop_samples):
        self.index, self.crop_samples = index, crop_samples

    def __len__(self):
        return len(self.index.clips)

    def __getitem__(self, number):
        return cut(load_clip_audio(self.index, self.index.clips[number], RATE, 0, self.crop_samples), self.crop_samples)


class IndexedLatents(Dataset):
    """Only the latents of our loader, to compare with readers that do no more."""

    def __init__(self, encoded, frames):
        self.encoded, self.frames = encoded, frames

    def __len__(self):
        return len(self.encoded.clips)

    def __getitem__(self, number):
        return self.encoded.latents(self.encoded.clips[number], False).window(0, self.frames).contiguous()


def fitted(data, crop_samples):
    """Decode and cut. Clips already are stereo at the model's rate, so nothing is resampled."""
    samples_NC, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return cut(torch.from_numpy(np.ascontiguousarray(samples_NC.T)), crop_samples)


def cut(audio_CN, crop_samples):
    missing = crop_samples - audio_CN.shape[1]
    return torch.nn.functional.pad(audio_CN, (0, missing)) if missing > 0 else audio_CN[:, :crop_samples].contiguous()


def write_clips(folder, count, seconds):
    """Write captioned clips of coloured noise in FLAC, which decodes as slowly as music."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        audio_NC = np.cumsum(rng.standard_normal((int(seconds * RATE), 2)), axis=0)
        audio_NC -= audio_NC.mean(axis=0)
        audio_NC *= 0.5 / np.abs(audio_NC).max()
        data = io.BytesIO()
        soundfile.write(data, audio_NC.astype(np.float32), RATE, format="FLAC")
        (folder / f"clip{number:04d}.flac").write_bytes(data.getvalue())
        (folder / f"clip{number:04d}.txt").write_text(f"noise number {number}")
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return folder.with_suffix(".zip")


def write_latents(encoded, work):
    """Write latents and prompts to latent shards, and the same latents to a WebDataset tar of .npy."""
    generator = torch.Generator().manual_seed(0)
    with webdataset.TarWriter(str(work / "latents.tar")) as tar:
        for clip in encoded.clips:
            frames = -(-clip.samples // FRAME)
            latents_DT = torch.randn(CHANNELS, frames + SILENCE_TAIL_FRAMES, generator=generator)
            for flipped in (False, True):
                tensors = {
                    "latents": latents_DT,
                    "silence": latents_DT[:, :2].contiguous(),
                    "peaks": torch.ones(frames),
                }
                write_tensors(encoded.latents_path(clip, flipped), tensors)
            write_tensors(encoded.prompt_path(clip.caption), {"hidden": torch.randn(12, 768, generator=generator)})
            tar.write({"__key__": clip.key, "latents.npy": latents_DT.numpy(), "txt": clip.caption})
    pack_latents(encoded, Group(0, 1, torch.device("cpu")), StopRequest())


def make_variants(work, clips, seconds):
    """Name -> dataset of ``clips`` samples."""
    source = write_clips(work / "in", clips, seconds)
    index = build_shards(str(source), work / "work", allow_any_dataset_size=True)
    encoded = EncodedClips(index, work / "work", Framing, "a", "t")
    write_latents(encoded, work)
    frames = int(seconds * RATE) // FRAME
    settings = SampleSettings(3, 1, frames, 0.1, "file", ShiftConfig())
    tars = [str(index.directory / shard.name) for shard in index.shards]

    def pipeline(urls):
        return webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)

    return {
        "audio, ours": IndexedAudio(index, frames * FRAME),
        "audio, webdataset": pipeline(tars).map(lambda sample: fitted(sample["flac"], frames * FRAME)),
        "audio, folder": FolderAudio(work / "in", frames * FRAME),
        "latents, ours": IndexedLatents(encoded, frames),
        "latents, webdataset": pipeline([str(work / "latents.tar")])
        .decode()
        .map(lambda sample: torch.from_numpy(sample["latents.npy"][:, :frames].copy())),
        "whole training samples, ours": torch.utils.data.Subset(MicroBatches(encoded, settings), range(clips)),
    }


def measure(variants, clips, workers, rounds):
    """Seconds per sample of each variant, one value per round."""
    loaders = {
        name: DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        for name, dataset in variants.items()
    }
    clock = time.perf_counter if workers else time.process_time
    order = random.Random(0)
    seconds = {name: [] for name in loaders}
    for round_ in range(rounds + 1):
        # Random order: a pass finds in the caches what the previous one left there.
        for name in order.sample(list(loaders), len(loaders)):
            begin = clock()
            seen = sum(1 for _ in loaders[name])
            spent = clock() - begin
            assert seen == clips
            # The first pass starts the workers.
            if round_:
                seconds[name].append(spent / seen)
    return seconds


def rates(seconds):
    """Samples per second: median, slowest and fastest round."""
    return {
        name: {"samples_per_second": 1 / statistics.median(values), "spread": [1 / max(values), 1 / min(values)]}
        for name, values in seconds.items()
    }


def ratios(seconds):
    """How many times as fast as the others ours is, compared by round, so that disturbances are alike.

    median     of the rounds
    interval   95 % confidence interval of the median, from binomial order statistics
    """
    pairs = {
        "audio, ours over webdataset": ("audio, webdataset", "audio, ours"),
        "audio, ours over folder": ("audio, folder", "audio, ours"),
        "latents, ours over webdataset": ("latents, webdataset", "latents, ours"),
        "latents, ours over folder": ("audio, folder", "latents, ours"),
    }
    results = {}
    for name, (theirs, ours) in pairs.items():
        ratio = sorted(their / our for their, our in zip(seconds[theirs], seconds[ours], strict=True))
        outside = max(0, round((len(ratio) - 1.96 * math.sqrt(len(ratio))) / 2) - 1)
        results[name] = {"median": statistics.median(ratio), "interval": [ratio[outside], ratio[-1 - outside]]}
    return results


def main():
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--workers", default="1,2", help="numbers of loader processes to measure with")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of every variant")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {"clips": options.clips, "seconds": options.seconds, "rounds": options.rounds, "workers": {}}
    report |= {"torch": torch.__version__, "webdataset": webdataset.__version__, "cpus": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name:
        variants = make_variants(Path(name), options.clips, options.seconds)
        for workers in map(int, options.workers.split(",")):
            seconds = measure(variants, options.clips, workers, options.rounds)
            rows = report["workers"][str(workers)] = {"rows": rates(seconds), "ratios": ratios(seconds)}
            for row, figures in rows["rows"].items():
                print(f"{workers} workers  {row:<28} {figures['samples_per_second']:9.1f} samples/s", file=sys.stderr)
            for row, ratio in rows["ratios"].items():
                low, high = ratio["interval"]
                print(f"{workers} workers  {row:<32} {ratio['median']:6.2f} ({low:.2f} to {high:.2f})", file=sys.stderr)
    if options.out:
        write_json(options.out, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
