"""World size and parallel mode do not change the training: every mode against one process, as a table.

    python tests/survival/world_sizes.py [--steps 30] [--only zero3] [--out DIRECTORY]

Every run takes the same number of clips per step, divided over ranks and accumulation; ranks are forked from this
process, which has imported the program. Compared are the loss of every
step, the float32 tensors of the last checkpoint (relative Frobenius distance of the whole state and of the worst
tensor), and whether the float16 file is one rounding of them. Exits with 1 when a bound is exceeded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

# Before torch: it sets how many threads that has.
from trial import ROOT, ForkedTrial  # isort: skip

import torch
from safetensors.torch import load_file

from sa3dist.commands.demo import synthesise_clips
from sa3dist.model.tiny import write_tiny_base

CLIPS_PER_STEP = 4
# Relative, in float32 on the CPU; "state" is over all tensors together. Worst tensor: a lora_B begins at zero, and an
# entry whose first gradient is all rounding moves by what AdamW makes of that.
# bf16: some ten times what was measured; a last bit of an adapter decides how its product is rounded.
BOUNDS = {"no": {"loss": 1e-5, "state": 1e-5, "worst_tensor": 3e-5}, "bf16": {"loss": 2e-3, "state": 1e-4}}
EVERYTHING_DIVIDED = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 5000000}


@dataclasses.dataclass(frozen=True)
class Mode:
    """launcher: "plain", "ddp", or the name of a DeepSpeed file in configs/deepspeed or made here.

    "formed" is "divided" with weights formed for every use of a block.
    """

    launcher: str
    ranks: int
    precision: str = "no"

    @property
    def name(self) -> str:
        return f"{self.launcher}-{self.ranks}-{self.precision}"

    @property
    def accumulation(self) -> int:
        return CLIPS_PER_STEP // self.ranks


MODES = [
    Mode(launcher, ranks, precision)
    for precision, rows in {
        "no": "plain 1, ddp 2, ddp 4, zero1 2, zero2 2, zero3 1, zero3 2, divided 2, formed 2, zero3 4",
        "bf16": "plain 1, ddp 2, zero2 2, divided 2",
    }.items()
    for launcher, ranks in ((row.split()[0], int(row.split()[1])) for row in rows.split(","))
]


def run(mode: Mode, directory: Path, common: dict) -> Path:
    """Train in one mode, in ranks forked from this process; returns its output directory."""
    output = directory / mode.name
    words = common | {"output_dir": output, "mixed_precision": mode.precision}
    words |= {"gradient_accumulation_steps": mode.accumulation}
    file = None if mode.launcher in ("plain", "ddp") else ROOT / "configs" / "deepspeed" / f"{mode.launcher}.json"
    if mode.launcher == "formed":
        words |= {"adapter_products": "per_use", "gradient_checkpointing": "auto"}
    if mode.launcher in ("divided", "formed"):
        file = directory / "divided.json"
        file.write_text(json.dumps({"zero_optimization": EVERYTHING_DIVIDED}))
    trial = ForkedTrial(words, mode.ranks, output, output.with_suffix(".log"), as_agent=True, zero=file)
    assert trial.wait() == 0, trial.said()
    return output


def losses(output: Path) -> torch.Tensor:
    return torch.tensor([json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()])


def state(output: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(max((output / "checkpoints").iterdir()) / f"{name}.safetensors")


def distances(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative Frobenius distance of everything together, and of the worst tensor."""
    assert found.keys() == expected.keys()
    assert all(found[key].numel() and found[key].dtype == torch.float32 for key in expected)
    squares = torch.tensor(
        [[(found[k] - v).double().square().sum(), v.double().square().sum()] for k, v in expected.items()]
    )
    together, each = squares.sum(0), squares[:, 0] / squares[:, 1].clamp(min=1e-60)
    return (together[0] / together[1]).sqrt().item(), each.max().sqrt().item()


def compare(mode: Mode, output: Path, reference: Path) -> dict:
    adapters = state(output, "adapter")
    published = load_file(output / "lora.safetensors")
    whole, worst = distances(adapters, state(reference, "adapter"))
    expected = losses(reference)
    return {
        "mode": mode.launcher,
        "ranks": mode.ranks,
        "accumulation": mode.accumulation,
        "autocast": mode.precision,
        "loss": ((losses(output) - expected).abs() / expected.abs()).max().item(),
        "state": whole,
        "worst_tensor": worst,
        "moments": distances(state(output, "moments"), state(reference, "moments"))[0],
        "tensors": len(adapters),
        "file_is_one_rounding": all(torch.equal(published[key], value.half()) for key, value in adapters.items()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", default="", help="modes whose name holds this, and the references")
    parser.add_argument("--out", type=Path, help="kept; unset = a temporary directory")
    arguments = parser.parse_args()
    directory = (arguments.out or Path(tempfile.mkdtemp(prefix="world_sizes."))).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    base = write_tiny_base(directory / "base")
    synthesise_clips(directory / "clips.zip", seed=1, count=12)
    common = {"audio_data_url": directory / "clips.zip", "model": base, "work_dir": directory / "work", "duration": 3}
    common |= {"number_of_steps": arguments.steps, "rank": 5, "base_precision": "fp32", "log_every": 1}
    common |= {"num_workers": 0, "save_every": 1000000, "resume": "never", "pre_encode": "true", "seed": 3}
    common |= {"report": "false", "gradient_checkpointing": "off"}
    failed = False
    chosen = [mode for mode in MODES if arguments.only in mode.name]
    references = {mode.precision for mode in chosen}
    for mode in MODES:
        if mode not in chosen and not (mode.launcher == "plain" and mode.precision in references):
            continue
        output = run(mode, directory, common)
        row = compare(mode, output, directory / Mode("plain", 1, mode.precision).name)
        # In its first steps AdamW makes a whole learning rate of a gradient that is all rounding.
        bounds = {
            key: bound
            for key, bound in BOUNDS[mode.precision].items()
            if key != "worst_tensor" or arguments.steps >= 30
        }
        row["ok"] = row["file_is_one_rounding"] and all(row[key] <= bound for key, bound in bounds.items())
        failed = failed or not row["ok"]
        print(json.dumps(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
