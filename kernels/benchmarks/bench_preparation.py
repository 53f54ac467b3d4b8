"""Clips per second of `sa3dist shard` and `sa3dist inspect`, and of decoding the same clips.

    python kernels/benchmarks/bench_preparation.py [--clips 1000] [--seconds 12] [--repeats 3]
        [--source CLIPS.zip] [--out FILE.json]

Without --source, clips are generated: stereo noise with a beat, alternating FLAC, WAV, OGG and MP3. "decoder" only
decodes all clips with libsndfile, one thread per core: the upper bound of both stages. "decoder, digest" also computes
each file's SHA-256. "shard" also measures what it decodes, as the command does; "shard in a run" does not, as when
training begins with it. The second of "shard" and "inspect" decodes nothing. Processor seconds show what bounds a stage
on a busy machine.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import statistics
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
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.kinds import AUDIO_EXTENSIONS
from sa3dist.formats import write_json
from sa3dist.inspection.measure import measure_clip
from sa3dist.inspection.report import inspect_source

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
    """Decode all clips in blocks, with one thread per core; returns their number."""
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


def timed(work):
    """Wall-clock and processor seconds."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - cpu_begin


def stages(source, work):
    """Name -> function of each timed stage, in order, starting with an empty ``work``."""

    def shard(place, measure=measure_clip):
        return lambda: build_shards(str(source), work / place, allow_any_dataset_size=True, measure=measure)

    def inspect(place):
        settings = config.build({"audio_data_url": str(source), "work_dir": str(work / place)})
        return lambda: inspect_source(settings, FRAMING)

    return {
        "decoder": lambda: decode_all(source),
        "decoder, digest": lambda: decode_all(source, digest=True),
        "shard in a run": shard("training", None),
        "shard": shard("one"),
        "inspect after shard": inspect("one"),
        "shard again": shard("one"),
        "inspect": inspect("other"),
        "shard after inspect": shard("other"),
        "inspect again": inspect("other"),
    }


def measure(source, work, repeats):
    """Number of clips, and medians over ``repeats`` rounds by stage and by order of the two stages."""
    torch.set_num_threads(1)
    count = decode_all(source)
    runs = []
    for number in range(repeats):
        place = work / str(number)
        runs.append({name: timed(stage) for name, stage in stages(source, place).items()})
        shutil.rmtree(place)
    rows = {name: row([run[name] for run in runs], count) for name in runs[0]}
    orders = {}
    for first, second in (("shard", "inspect after shard"), ("inspect", "shard after inspect")):
        # Ratios within a round, because the speed of cores changes from minute to minute.
        ratios = [[2 * run["decoder, digest"][k] / (run[first][k] + run[second][k]) for run in runs] for k in (0, 1)]
        names = "speed_of_two_decodings", "cpu_of_two_decodings"
        orders[f"{first}, {second}"] = dict(zip(names, map(statistics.median, ratios), strict=True))
    return count, rows, orders


def row(timings, count):
    seconds, cpu_seconds = (statistics.median(values) for values in zip(*timings, strict=True))
    return {
        "clips_per_second": count / seconds,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "cpu_ms_per_clip": 1000 * cpu_seconds / count,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--source", type=Path, help="a zip of real clips instead (tests/helpers/make_real_dataset.py makes one)"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = options.source or Path(name) / "clips.zip"
        if options.source is None:
            write_clips(source, options.clips, options.seconds)
        count, rows, orders = measure(source, Path(name), options.repeats)
    report = {"clips": count, "cpus": os.cpu_count(), "repeats": options.repeats, "rows": rows, "orders": orders}
    for name, figures in rows.items():
        print(
            f"{name:<19} {figures['clips_per_second']:8.1f} clips/s, {figures['cpu_ms_per_clip']:6.2f} ms of processor "
            "time per clip",
            file=sys.stderr,
        )
    for name, ratios in orders.items():
        print(
            f"{name}: {ratios['speed_of_two_decodings']:.2f} times the speed of two passes of decoding and digests, "
            f"{ratios['cpu_of_two_decodings']:.2f} by processor time",
            file=sys.stderr,
        )
    if options.out:
        write_json(options.out, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
