"""Samples per second of our stream, a plain webdataset pipeline and a plain PyTorch folder dataset, on the same files.

    python kernels/benchmarks/bench_loader.py [--clips 64] [--seconds 12] [--workers 2] [--out FILE.json]

audio    decode every clip, cut or pad it to the crop: ours reads it from the shard by offset and checks its digest
latents  read every clip's latents and cut them; the folder dataset, which keeps none, decodes as before
ours     the samples as the training step takes them: besides the latents also prompt, noise, masks, coupling, target
No model is needed: the latents are random, of the released shape (256 x frames).
"""

import argparse
import io
import json
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

from sa3dist.data.audio import decode, load_clip_audio, resample
from sa3dist.data.latents import SILENCE_TAIL_FRAMES, EncodedClips, read_tensors, write_tensors
from sa3dist.data.stream import MicroBatches, StreamSettings
from sa3dist.formats import write_json
from sa3dist.model.config import ShiftConfig
from sa3dist.shard import build_shards

RATE, FRAME, CHANNELS, TOKENS = 44100, 4096, 256, 256
ROUNDS = 5


class Framing:
    sample_rate_hz, samples_per_frame, latent_channels, prompt_tokens = RATE, FRAME, CHANNELS, TOKENS


class FolderAudio(Dataset):
    """What a newcomer writes: a list of files, decoded when asked for."""

    def __init__(self, folder, crop_samples):
        self.paths, self.crop_samples = sorted(folder.glob("*.flac")), crop_samples

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        return fitted(self.paths[number].read_bytes(), self.crop_samples)


class IndexedAudio(Dataset):
    """Our reader of audio, as the encode stage uses it, and the same cut."""

    def __init__(self, index, crop_samples):
        self.index, self.crop_samples = index, crop_samples

    def __len__(self):
        return len(self.index.clips)

    def __getitem__(self, number):
        return cut(load_clip_audio(self.index, self.index.clips[number], RATE), self.crop_samples)


class IndexedLatents(Dataset):
    """The latents of our stream alone, to compare with readers that do no more."""

    def __init__(self, encoded, frames):
        self.encoded, self.frames = encoded, frames

    def __len__(self):
        return len(self.encoded.clips)

    def __getitem__(self, number):
        return self.encoded.latents(self.encoded.clips[number], False).window(0, self.frames)


def fitted(data, crop_samples):
    audio_CN, rate = decode(data)
    return cut(resample(torch.from_numpy(audio_CN[:2]), rate, RATE).expand(2, -1), crop_samples)


def cut(audio_CN, crop_samples):
    return torch.nn.functional.pad(audio_CN[:, :crop_samples], (0, max(0, crop_samples - audio_CN.shape[1])))


def write_clips(folder, count, seconds):
    """Coloured noise in FLAC with captions: decodes as slowly as music."""
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
    """Our latents and prompts, and the same latents as a WebDataset tar of .npy."""
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
    read_tensors(encoded.latents_path(encoded.clips[0], False), "first latents")


def rate_of(make, count, workers):
    """Median samples per second over whole passes, workers started before the clock."""
    rates = []
    for _ in range(ROUNDS + 1):
        source = iter(DataLoader(make(), batch_size=None, num_workers=workers))
        first = next(source)
        begin = time.perf_counter()
        seen = sum(1 for _ in source)
        rates.append(seen / (time.perf_counter() - begin))
        assert first is not None
        assert seen == count - 1
    return {"samples_per_second": statistics.median(rates[1:]), "spread": [min(rates[1:]), max(rates[1:])]}


def main():
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--clips", type=int, default=64)
    made.add_argument("--seconds", type=float, default=12.0)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--out", type=Path)
    chosen = made.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name), chosen.clips, chosen.seconds, chosen.workers)
    for row, figures in rows.items():
        print(f"{row:<28} {figures['samples_per_second']:9.1f} samples/s", file=sys.stderr)
    report = {"clips": chosen.clips, "seconds": chosen.seconds, "workers": chosen.workers, "rows": rows}
    report |= {"torch": torch.__version__, "cpus": torch.get_num_threads()}
    if chosen.out:
        write_json(chosen.out, report)
    print(json.dumps(report))


def measure(work, clips, seconds, workers):
    source = write_clips(work / "in", clips, seconds)
    index = build_shards(str(source), work / "work", allow_any_dataset_size=True)
    encoded = EncodedClips(index, work / "work", Framing, "a", "t")
    write_latents(encoded, work)
    frames = int(seconds * RATE) // FRAME
    settings = StreamSettings(3, 1, frames, 0.1, "file", ShiftConfig())
    tars = [str(index.directory / shard.name) for shard in index.shards]

    def webdataset_audio():
        split = webdataset.split_by_worker if workers else webdataset.shardlists.single_node_only
        stream = webdataset.WebDataset(tars, shardshuffle=False, workersplitter=split, empty_check=False)
        return stream.map(lambda sample: fitted(sample["flac"], frames * FRAME))

    def webdataset_latents():
        stream = webdataset.WebDataset([str(work / "latents.tar")], shardshuffle=False, empty_check=False)
        return stream.decode().map(lambda sample: torch.from_numpy(sample["latents.npy"][:, :frames]))

    def ours():
        return torch.utils.data.Subset(MicroBatches(encoded, settings), range(clips))

    return {
        "audio, ours": rate_of(lambda: IndexedAudio(index, frames * FRAME), clips, workers),
        "audio, webdataset": rate_of(webdataset_audio, clips, workers),
        "audio, folder": rate_of(lambda: FolderAudio(work / "in", frames * FRAME), clips, workers),
        "latents, ours": rate_of(lambda: IndexedLatents(encoded, frames), clips, workers),
        "latents, webdataset": rate_of(webdataset_latents, clips, workers),
        "whole training samples, ours": rate_of(ours, clips, workers),
    }


if __name__ == "__main__":
    main()
