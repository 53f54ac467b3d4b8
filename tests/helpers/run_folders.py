"""A run's folder as a run leaves it, made up: rows, previews, health, copies, warnings, and the shards of its clips."""

import io
import json

import numpy as np
import soundfile
import torch
import yaml

from sa3dist.data.source.build import build_shards
from sa3dist.listening.spectrogram import write_spectrogram
from tests.helpers.clips import captioned, write_zip

RATE = 44100


def make_run(folder, steps=40, preview_steps=(0, 20, 40), prompts=2, seconds=1.0, linked=False, **settings):
    """Write the folder; settings go into run.yaml. Returns the rows of metrics.jsonl.

    linked   clips of later steps are those of the first one: many long ones would take long to make
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(steps)
    index = build_shards(str(write_zip(folder.parent / f"{folder.name}.zip", captioned(4))), folder.parent / "work")
    values = {"name": "a run", "output_dir": str(folder), "work_dir": str(folder.parent / "work")}
    (folder / "run.yaml").write_text(yaml.safe_dump({**values, "number_of_steps": steps, **settings}))
    about = {"dataset_sha256": index.digest, "dataset_clips": 4, "dataset_seconds": 4.0, "base_sha256": "b" * 64}
    (folder / "config.json").write_text(json.dumps(about))
    rows = [_row(step, rng) for step in range(1, steps + 1)]
    rows[0]["startup_seconds"] = {"before_run": 3.0, "first_step": 0.5, "total": 3.5}
    base = {"step": 0, **{f"val/loss_{time}": 1.0 + time for time in (0.1, 0.3, 0.5, 0.7, 0.9)}, "val/loss": 1.5}
    write_lines(folder / "metrics.jsonl", [base, *rows])
    (folder / "best.json").write_text(json.dumps({"step": steps // 2, "val/loss": 1.2}))
    layers = [
        {"name": f"model.layers.{n}.{kind}", "update_ratio": 0.01 * n, "effective_rank": 2.0 + n, "drift": 0.99}
        for n in range(3)
        for kind in ("attn.to_qkv", "ff.proj")
    ]
    drift = {"mean": 0.98, "p5": 0.97, "p95": 0.99, "negative": 0.0}
    health = {"drift": drift, "update_ratio": 0.02, "effective_rank": 3.0, "layers": layers, "verdict": "healthy"}
    write_lines(folder / "health.jsonl", [{"step": step, **health, "reasons": ["all is well"]} for step in (20, 40)])
    nearest = {"number": 0, "clip": index.clips[0].key, "seconds": 0.2, "mel": 1.0, "latent": 1.0, "rank": 0.5}
    copies = {"previews": [{**nearest, "warning": None}], "held_out": 6, "judged": True, "reason": None}
    write_lines(folder / "copies.jsonl", [{"step": preview_steps[-1], **copies}])
    write_lines(folder / "warnings.jsonl", [{"time": "2026-01-01", "level": "warning", "message": "it is warm"}] * 2)
    for step in preview_steps:
        for number in range(prompts):
            first = (
                folder / "previews" / f"step-{preview_steps[0]:08d}" if linked and step != preview_steps[0] else None
            )
            _preview(folder / "previews" / f"step-{step:08d}", step, number, seconds, rng, first)
    return [base, *rows]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(step, rng):
    validation = {f"val/loss_{time}": 1.0 + time - 0.001 * step for time in (0.1, 0.3, 0.5, 0.7, 0.9)}
    row = {"step": step, "loss": float(rng.gamma(4, 0.25)), "grad_norm": float(rng.gamma(2, 0.1)), "lr": 1e-4}
    row |= {"clips_seen": 4 * step, "step_seconds": 0.5, "data_wait": float(rng.uniform(0, 0.2))}
    row |= {"peak_bytes": 10**9, "loss_by_timestep": [1.0, None, 0.8, 0.7, float(rng.uniform())]}
    return row | ({**validation, "val/loss": 1.5 - 0.001 * step, "val/gain": -0.001 * step} if step % 10 == 0 else {})


def _preview(folder, step, number, seconds, rng, first):
    folder.mkdir(parents=True, exist_ok=True)
    about = {"prompt": f"prompt {number}", "number": number, "step": step, "seconds": seconds, "seed": 0}
    (folder / f"{number}.json").write_text(json.dumps(about))
    if first:
        for kind in ("flac", "png"):
            (folder / f"{number}.{kind}").hardlink_to(first / f"{number}.{kind}")
        return
    time_N = np.arange(round(seconds * RATE)) / RATE
    tones_NC = np.stack([np.sin(2 * np.pi * hertz * time_N) for hertz in rng.uniform(100, 2000, 2)], axis=1)
    audio_NC = 0.3 * tones_NC + 0.02 * rng.standard_normal(tones_NC.shape)
    soundfile.write(folder / f"{number}.flac", audio_NC, RATE, subtype="PCM_24")
    write_spectrogram(folder / f"{number}.png", torch.from_numpy(audio_NC.T.copy()), RATE)


def decoded(address):
    """Samples (N, C) of a clip that stands inside a page."""
    import base64

    kind, _, data = address.partition(";base64,")
    assert kind == "data:audio/ogg"
    return soundfile.read(io.BytesIO(base64.b64decode(data)), always_2d=True)[0]
