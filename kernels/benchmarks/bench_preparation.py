"""Clips per second of `sa3dist shard` and `sa3dist inspect`, and of nothing but decoding the same clips.

    python kernels/benchmarks/bench_preparation.py [--clips 1000] [--seconds 12] [--source CLIPS.zip] [--out FILE.json]

Without --source, clips are made: stereo noise with a beat, in turn FLAC, WAV, OGG and MP3.
"decoder" decodes all of them with libsndfile, as many threads as cores, doing nothing else: the bound of both stages.
"decoder, digest" also takes the SHA-256 of every file. "shard after inspect" finds every clip checked. Processor
seconds tell what bounds a stage when the machine is not quiet.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch

from sa3dist import config
from sa3dist.data.archive import AUDIO_EXTENSIONS
from sa3dist.formats import write_json
from sa3dist.inspection import inspect_source
from sa3dist.shard import build_shards

RATE = 44100
FORMATS = ("FLAC", "WAV", "OGG", "MP3")
# Framing of the released medium base: native seconds, sample rate, samples per latent frame.
FRAMING = (380.0, RATE, 4096)


def one_clip(number, seconds):
    """Audio file bytes and extension of one clip."""
    rng = np.random.default_rng(number)
    time_N = np.arange(int(seconds * RATE)) / RATE
    audio_NC = np.cumsum(rng.standard_normal((len(time_N), 2)), axis=0)
    audio_NC -= audio_NC.mean(axis=0)
    beat_N = np.exp(-8 * (time_N * rng.uniform(1, 3) % 1))
    audio_NC = audio_NC * beat_N[:, None] * (0.7 / np.abs(audio_NC).max())
    container = FORMATS[number % len(FORMATS)]
    out = io.BytesIO()
    soundfile.write(out, audio_NC.astype(np.float32), RATE, format=container)
    return out.getvalue(), container.lower()


def write_clips(path, count, seconds):
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            data, extension = one_clip(number, seconds)
            archive.writestr(f"clip{number:05d}.{extension}", data)
            archive.writestr(f"clip{number:05d}.txt", f"a beat number {number}")


def decode_all(source, digest=False):
    """Every clip decoded, in blocks, by one thread per core."""
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if name.rpartition(".")[2].lower() in AUDIO_EXTENSIONS]

        def decode(name):
            data = archive.read(name)
            if digest:
                hashlib.sha256(data).digest()
            with soundfile.SoundFile(io.BytesIO(data)) as sound:
                while len(sound.read(1 << 18, dtype="float32")):
                    pass

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return sum(1 for _ in pool.map(decode, names))


def timed(work, count):
    begin, cpu_begin = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    return {"clips_per_second": count / seconds, "seconds": seconds, "cpu_seconds": cpu_seconds}


def measure(source, work):
    torch.set_num_threads(1)
    count = decode_all(source)
    rows = {"decoder": timed(lambda: decode_all(source), count)}
    rows["decoder, digest"] = timed(lambda: decode_all(source, digest=True), count)

    def shard(place):
        return lambda: build_shards(str(source), work / place, allow_any_dataset_size=True)

    def inspect(place):
        settings = config.build({"audio_data_url": str(source), "work_dir": str(work / place)})
        return lambda: inspect_source(settings, FRAMING)

    rows["shard"] = timed(shard("one"), count)
    rows["shard again"] = timed(shard("one"), count)
    rows["inspect"] = timed(inspect("other"), count)
    rows["inspect again"] = timed(inspect("other"), count)
    rows["shard after inspect"] = timed(shard("other"), count)
    decoder = rows["decoder, digest"]["cpu_seconds"]
    for row in rows.values():
        row["decoding_share_of_cpu"] = min(1.0, decoder / row["cpu_seconds"])
        row["cpu_ms_per_clip"] = 1000 * row["cpu_seconds"] / count
    return count, rows


def main():
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--clips", type=int, default=1000)
    made.add_argument("--seconds", type=float, default=12.0)
    made.add_argument("--source", type=Path, help="a zip of real clips instead (tests/make_real_dataset.py makes one)")
    made.add_argument("--out", type=Path)
    chosen = made.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = chosen.source or Path(name) / "clips.zip"
        if chosen.source is None:
            write_clips(source, chosen.clips, chosen.seconds)
        count, rows = measure(source, Path(name))
    report = {"clips": count, "cpus": os.cpu_count(), "rows": rows}
    for row, figures in rows.items():
        print(
            f"{row:<19} {figures['clips_per_second']:8.1f} clips/s, {figures['cpu_ms_per_clip']:6.2f} ms of processor "
            f"a clip, {figures['decoding_share_of_cpu']:.0%} of it what decoding and digest take",
            file=sys.stderr,
        )
    if chosen.out:
        write_json(chosen.out, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
