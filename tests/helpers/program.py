"""The trainer as users start it: words of a short run, this process or others, and what the run left."""

import json
import os
import sys
from pathlib import Path

from sa3dist import train
from tests.helpers.golden import ROOT, THREADS

STEPS = 6


def short_run(clips, base, work_dir):
    """key=value words of a small deterministic float32 run."""
    return [
        f"audio_data_url={clips}",
        f"model={base}",
        f"work_dir={work_dir}",
        f"number_of_steps={STEPS}",
        "learning_rate=3e-3",
        "rank=4",
        "base_precision=fp32",
        "mixed_precision=no",
        "deterministic=true",
        "duration=2",
        "log_every=1",
        "log_clips=true",
        # Processes of their own for the loader and each page, and counting what a step keeps, would be most of what the
        # suite does.
        "num_workers=0",
        "report=false",
        "gradient_checkpointing=off",
    ]


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def status(output_dir: Path) -> dict:
    return json.loads((output_dir / "status.json").read_text())


def run(words, output_dir, *more) -> int:
    return train.main([*words, f"output_dir={output_dir}", *more])


def command(*words, ranks=1):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "sa3dist.train", *words]


ENVIRONMENT = {
    **os.environ,
    "ACCELERATE_USE_CPU": "true",
    # As many as in this process: the same bits are expected.
    "OMP_NUM_THREADS": str(THREADS),
    "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
}
