"""`make demo`: train a tiny base on synthesised clips, reload the adapter and compare the losses.

The clips are tones, chirps, drums and noise, with captions that say what was synthesised.
"""

import argparse
import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sa3dist.formats import atomic_path

# (extension, libsndfile format, subtype): lossless and lossy formats that users upload.
_FORMATS = (("wav", "WAV", "PCM_16"), ("flac", "FLAC", "PCM_24"), ("ogg", "OGG", "VORBIS"), ("mp3", "MP3", None))
_SAMPLE_RATES_HZ = (22050, 32000, 44100, 48000)
_SECONDS_RANGE = (0.5, 12.0)
# Below full scale, so that lossy codecs do not exceed it.
_PEAK = 0.7
# Audible on small speakers, and below half of the lowest sample rate.
_HERTZ_RANGE = (80.0, 4000.0)

# Folder of `make demo`, in the current directory.
FOLDER = Path("demo")
# Not the training's seed, so that the comparison uses draws not seen in training.
EVALUATION_SEED = 4242
EVALUATION_BATCHES = 96


def synthesise_clips(path_zip: Path, seed: int = 0, count: int = 24) -> None:
    """Write ``count`` captioned clips to ``path_zip``, atomically.

    Kinds, formats (wav, flac, ogg, mp3), sample rates, mono and stereo alternate; lengths range from 0.5 to 12 s.
    Everything depends only on seed and count, except the stream number in ogg files, which libsndfile takes from the
    clock.
    """
    import soundfile

    rng = np.random.default_rng(seed)
    seconds = rng.permutation(np.geomspace(*_SECONDS_RANGE, count))
    kinds = tuple(_SYNTHS.items())
    with atomic_path(Path(path_zip)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for number in range(count):
            kind, synth = kinds[number % len(kinds)]
            # Shift by one per round, so that a kind does not always get the same format.
            extension, container, subtype = _FORMATS[(number + number // len(kinds)) % len(_FORMATS)]
            rate = _SAMPLE_RATES_HZ[(number // 2 + number // 8) % len(_SAMPLE_RATES_HZ)]
            channels = 1 + (number // 3) % 2
            mono_N, caption = synth(rng, np.arange(round(seconds[number] * rate)) / rate)
            stem = f"{kind}/{kind}_{number:02d}"
            sound = io.BytesIO()
            soundfile.write(sound, _stage(rng, mono_N, channels), rate, format=container, subtype=subtype)
            # ZipInfo has a constant default date; writestr with a name would use the current time.
            archive.writestr(zipfile.ZipInfo(f"{stem}.{extension}"), sound.getvalue())
            archive.writestr(zipfile.ZipInfo(f"{stem}.txt"), f"{caption}, {seconds[number]:.1f} seconds")


def _tone(rng: np.random.Generator, time_N: np.ndarray) -> tuple[np.ndarray, str]:
    hertz = _draw_hertz(rng)
    harmonics = int(rng.integers(1, 6))
    # Nothing above 8 kHz, so that no file's rate aliases it.
    wave = sum(np.sin(2 * np.pi * hertz * k * time_N) / k for k in range(1, harmonics + 1) if hertz * k < 8000)
    tremolo = 1 + 0.3 * np.sin(2 * np.pi * rng.uniform(2, 7) * time_N)
    colour = "pure sine" if harmonics == 1 else f"bright {harmonics}-harmonic"
    return wave * tremolo, f"a {colour} tone at {hertz:.0f} Hz with tremolo"


def _chirp(rng: np.random.Generator, time_N: np.ndarray) -> tuple[np.ndarray, str]:
    first, last = _draw_hertz(rng), _draw_hertz(rng)
    phase_N = 2 * np.pi * np.cumsum(np.geomspace(first, last, len(time_N))) * (time_N[1] - time_N[0])
    direction = "rising" if last > first else "falling"
    return np.sin(phase_N), f"a {direction} synth sweep from {first:.0f} to {last:.0f} Hz"


def _drum(rng: np.random.Generator, time_N: np.ndarray) -> tuple[np.ndarray, str]:
    beats_per_minute = int(rng.integers(60, 180))
    since_hit_N = time_N % (60 / beats_per_minute)
    hertz = rng.uniform(45, 90)
    # A body whose pitch falls from nine times its final value within 50 ms, plus a noisy stick.
    body_N = np.sin(2 * np.pi * hertz * (since_hit_N - 8 / 40 * np.exp(-40 * since_hit_N)))
    stick_N = rng.standard_normal(len(time_N)) * np.exp(-since_hit_N * 200)
    decay = rng.uniform(6, 20)
    name = "short dry" if decay > 12 else "long booming"
    wave = body_N * np.exp(-since_hit_N * decay) + 0.4 * stick_N
    return wave, f"a {name} kick drum loop at {beats_per_minute} bpm"


def _noise(rng: np.random.Generator, time_N: np.ndarray) -> tuple[np.ndarray, str]:
    slope = float(rng.choice([0.0, 0.5, 1.0]))
    spectrum = np.fft.rfft(rng.standard_normal(len(time_N)))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -slope
    swell_hertz = rng.uniform(0.2, 2)
    wave = np.fft.irfft(spectrum, len(time_N)) * (0.6 + 0.4 * np.sin(2 * np.pi * swell_hertz * time_N))
    colour = {0.0: "white", 0.5: "pink", 1.0: "brown"}[slope]
    return wave, f"{colour} noise swelling {swell_hertz:.1f} times a second"


_SYNTHS = {"tone": _tone, "chirp": _chirp, "drum": _drum, "noise": _noise}


def _draw_hertz(rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(*np.log(_HERTZ_RANGE))))


def _stage(rng: np.random.Generator, mono_N: np.ndarray, channels: int) -> np.ndarray:
    """Normalise, fade in and out over 100 samples against clicks, and pan randomly: float32 (samples, channels)."""
    ramp_N = np.minimum(1, np.arange(1, len(mono_N) + 1) / 100)
    mono_N = mono_N * ramp_N * ramp_N[::-1]
    gains = np.ones(1) if channels == 1 else np.array([np.cos(a := rng.uniform(0.2, 1.3)), np.sin(a)])
    stage_NC = mono_N[:, None] * gains
    return (_PEAK * stage_NC / np.abs(stage_NC).max()).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """`make demo`: make clips and a tiny base, train, reload the adapter and compare losses."""
    parser = argparse.ArgumentParser(prog="python -m sa3dist.commands.demo", description=main.__doc__)
    parser.add_argument("--prepare", action="store_true", help="make demo/clips.zip and demo/base, and train nothing")
    only_prepare = parser.parse_args(argv).prepare
    import torch

    from sa3dist import train
    from sa3dist.model.tiny import write_tiny_base
    from sa3dist.report.page import PAGE_NAME

    # The tiny base's operations are too small for several threads.
    torch.set_num_threads(1)
    clips, base = FOLDER / "clips.zip", FOLDER / "base"
    if not clips.exists():
        synthesise_clips(clips)
    if not (base / "model.safetensors").exists():
        write_tiny_base(base)
    if only_prepare:
        return 0
    code = train.main(["configs/demo.yaml"])
    if code == 0:
        without, with_adapter = _losses_without_and_with(FOLDER / "run", base)
        fallen = 100 * (1 - with_adapter / without)
        print(
            f"Reloaded {FOLDER / 'run/lora.safetensors'}: over the same clips, crops, noise and times the loss is "
            f"{with_adapter:.4f} with it and {without:.4f} without, {fallen:.0f} % lower.",
            file=sys.stderr,
        )
        # The last line, so that it is easy to find.
        print(f"Its report, with previews to listen to: {(FOLDER / 'run' / PAGE_NAME).resolve()}", file=sys.stderr)
    return code


def _losses_without_and_with(run_dir: Path, base_dir: Path) -> tuple[float, float]:
    """Mean losses without and with the trained adapter, on the same draws, which were not used in training."""
    import torch

    from sa3dist import adapters, config
    from sa3dist.model.loading import load_base
    from sa3dist.pipeline import Run
    from sa3dist.runtime.process_group import Group
    from sa3dist.runtime.signals import StopRequest
    from sa3dist.training.loss import micro_batch_loss

    settings = config.build(config.read_file(str(run_dir / "run.yaml")) | {"seed": EVALUATION_SEED})
    run = Run(settings, Group(0, 1, torch.device("cpu")), StopRequest())
    base = load_base(base_dir)
    batches = run.encode(base, run.shard()).micro_batches

    @torch.no_grad()
    def mean_loss() -> float:
        losses = [
            micro_batch_loss(base, batches[index], settings)["loss"].item() for index in range(EVALUATION_BATCHES)
        ]
        return sum(losses) / len(losses)

    without = mean_loss()
    adapters.load_adapter(base, run_dir / "lora.safetensors")
    return without, mean_loss()


if __name__ == "__main__":
    sys.exit(main())
