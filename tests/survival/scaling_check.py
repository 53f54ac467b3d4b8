"""The scaling model against a network of known speed, and the tables it gives for real clusters.

    python tests/survival/scaling_check.py measure DIRECTORY      root: two hosts as namespaces, a few minutes
    python tests/survival/scaling_check.py count DIRECTORY [MODE ...]      root: likewise, bytes of every mode
    python tests/survival/scaling_check.py tables                 no training; the tables of docs/scaling.md

`measure` trains on two hosts and changes the speed of their link while it does, back to unbounded after each change, so
that every speed is compared to steps just before and after it. For each speed and gradient size: bytes per step by the
devices' counters against the counted formula, and the step's time against the model's, which knows the unbounded step,
the gradient's size and the speed set. Ends with 1 when a prediction is off by more than 20 %.
"""

import argparse
import functools
import json
import shutil
import statistics
import sys
from pathlib import Path

from namespaces import Job
from network import Network, require_root
from trial import ROOT, prepare, rows, wait_for

from tests.survival import network_model
from tests.survival.network_model import Cluster, Link, Sizes

MEGABITS = (5, 10, 20)
# Adapter rank: steps at each speed. Two gradient sizes, sixteen times apart.
ADAPTERS = {4: 8, 64: 4}
ROUNDS = 2
TOLERANCE = 0.2
COUNTED_RANK, COUNTED_ACCUMULATION = 16, 2
# What lets ZeRO-3 keep a tensor whole, or gathered until it is used again.
NOTHING_KEPT = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
# The first steps hold what is done once.
COUNTED_FROM, COUNTED_STEPS = 3, 10
# Gloo's messages over a veth pair: nothing beside these speeds.
VETH_LATENCY_SECONDS = 1e-4

# Bytes per second in one direction. NVLink: what NCCL's all-reduce reaches on eight H100 or H200. InfiniBand: eight
# 400 Gb/s ports per node. Ethernet: one 25 Gb/s port per node. The last two at 90 % of the wire.
CLUSTERS = {
    "InfiniBand": Cluster(8, Link(350e9, 3e-6), Link(8 * 50e9 * 0.9, 5e-6)),
    "25 GbE": Cluster(8, Link(350e9, 3e-6), Link(25e9 / 8 * 0.9, 30e-6)),
}
BASES, RANKS, GPUS, COMPUTE_SECONDS = ("small-music-base", "medium-base"), (16, 128), (8, 64, 512), (0.1, 0.3, 1.0)
COUNTED_GPUS = 64
PREDICTED_MODES = ("ddp", "zero-2", "zero-3")


def sizes_of(base: str, rank: int) -> Sizes:
    """Of the default adapter over every layer of a released base."""
    import torch

    from sa3dist.adapters.select import candidate_layers
    from sa3dist.model.base import wrapped
    from sa3dist.model.conditioners import Conditioners
    from sa3dist.model.dit import DiT
    from sa3dist.model.parse_config import parse_model_config
    from sa3dist.model.released import released_config

    config = parse_model_config(released_config(base), base)
    with torch.device("meta"):
        roots = (wrapped(DiT(config.dit)), Conditioners(config))
    trained, layers = 0, candidate_layers(roots)
    for layer in layers.values():
        fan_out, fan_in = layer.weight.shape[:2]
        # lora_A, lora_B and one magnitude per row.
        trained += rank * (fan_in + fan_out) + fan_out
    frozen = sum(parameter.numel() for root in roots for parameter in root.parameters())
    return Sizes(trained, frozen, layers=len(layers))


def tables() -> int:
    """In Markdown: what is sent, and what is left of the ideal."""
    sizes = {(base.removesuffix("-base"), rank): sizes_of(base, rank) for base in BASES for rank in RANKS}
    formulas = network_model.MODES | {"ddp bf16": functools.partial(network_model.ddp, compressed=True)}
    print(f"| base, rank | trained | {' | '.join(formulas)} |\n|---|---:|{'---:|' * len(formulas)}")
    for (base, rank), each in sizes.items():
        sent = [f"{network_model.sent_bytes(formula(each), COUNTED_GPUS) / 1e6:,.0f}" for formula in formulas.values()]
        print(f"| {base}, {rank} | {each.adapter_elements / 1e6:.1f} M | {' | '.join(sent)} |")
    print(
        f"\n| base, rank | network | mode | {' | '.join(f'{gpus} GPUs' for gpus in GPUS)} |\n|---|---|---|{'---|' * 3}"
    )
    for (base, rank), each in sizes.items():
        for network, cluster in CLUSTERS.items():
            for mode in PREDICTED_MODES:
                cells = [shares(formulas[mode](each), gpus, cluster) for gpus in GPUS]
                print(f"| {base}, {rank} | {network} | {mode} | {' | '.join(cells)} |")
    return 0


def shares(transfers: list[network_model.Transfer], gpus: int, cluster: Cluster) -> str:
    found = [network_model.efficiency(seconds, transfers, gpus, cluster) for seconds in COMPUTE_SECONDS]
    return " / ".join(f"{100 * share:.0f}" for share in found)


class Measurement:
    """One training over two hosts at changing speeds of the link."""

    def __init__(self, directory: Path, network: Network, rank: int) -> None:
        self.network, self.each = network, ADAPTERS[rank]
        self.plan = [speed for _ in range(ROUNDS) for bounded in MEGABITS for speed in (None, bounded)] + [None]
        steps = (len(self.plan) + 1) * self.each
        self.output_dir = directory / f"scaling-rank-{rank}"
        shutil.rmtree(self.output_dir, ignore_errors=True)
        self.output_dir.mkdir(parents=True)
        words = prepare(directory) | {"rank": rank, "number_of_steps": steps, "save_every": 10_000}
        self.job = Job(network, words, self.output_dir, f"scaling-rank-{rank}")

    def run(self) -> list[dict]:
        """Step seconds and bytes per step of every block of steps at one speed."""
        blocks, first = [], self.each
        self._reach(first)
        for speed in self.plan:
            if speed is not None:
                self.network.throttle(speed)
            # The step under way has met both speeds.
            begin = self._reach(len(rows(self.output_dir)) + 1)
            before = self.network.sent_bytes(0)
            end = self._reach(begin + self.each - 1)
            sent = (self.network.sent_bytes(0) - before) / (end - begin)
            if speed is not None:
                self.network.throttle(None)
            seconds = [row["step_seconds"] for row in rows(self.output_dir)[begin:end]]
            blocks.append({"speed": speed, "seconds": seconds, "sent": sent})
        self.job.parts[0].kill_all()
        self.job.parts[1].kill_all()
        for part in self.job.parts:
            part.wait()
        return blocks

    def _reach(self, step: int) -> int:
        wait_for(
            f"step {step}",
            lambda: len(rows(self.output_dir)) >= step or any(part.ended() for part in self.job.parts),
            seconds=300,
        )
        return len(rows(self.output_dir))


def compare(blocks: list[dict], elements: int) -> list[dict]:
    """One row per speed: what was measured, what the model says."""
    transfers = network_model.ddp(Sizes(elements))
    payload = network_model.sent_bytes(transfers, ranks=2)
    frames = network_model.ethernet_bytes(payload, acknowledged=payload)
    found = []
    for speed in MEGABITS:
        at = [number for number, block in enumerate(blocks) if block["speed"] == speed]
        around = [second for number in at for side in (-1, 1) for second in blocks[number + side]["seconds"]]
        unbounded = statistics.median(around)
        measured = statistics.median(second for number in at for second in blocks[number]["seconds"])
        # What the speed set means for payload: it counts whole frames.
        link = Link(speed * 1e6 / 8 * payload / frames, VETH_LATENCY_SECONDS)
        predicted = network_model.step_seconds(unbounded, transfers, 2, Cluster(1, link, link))
        sent = statistics.mean(blocks[number]["sent"] for number in at)
        found.append(
            {
                "gradient_bytes": elements * network_model.FP32_BYTES,
                "megabits": speed,
                "unbounded_seconds": round(unbounded, 3),
                "measured_seconds": round(measured, 3),
                "predicted_seconds": round(predicted, 3),
                "time_error": round(predicted / measured - 1, 3),
                "counted_bytes": round(payload),
                "counted_frame_bytes": round(frames),
                "sent_bytes": round(sent),
                "bytes_error": round(frames / sent - 1, 3),
            }
        )
    return found


def tiny_sizes(directory: Path, rank: int) -> Sizes:
    """Of the adapter that the tiny base gets at this rank."""
    from sa3dist import adapter_parameters, attach_adapter, load_base

    base = load_base(prepare(directory)["model"])
    frozen = sum(parameter.numel() for root in base.adapter_roots for parameter in root.parameters())
    attach_adapter(base, rank=rank)
    trained = sum(parameter.numel() for parameter in adapter_parameters(base).values())
    return Sizes(trained, frozen, base_bytes=network_model.FP32_BYTES, accumulation=COUNTED_ACCUMULATION)


def measure(directory: Path) -> int:
    require_root()
    found = []
    with Network(2) as network:
        for rank in ADAPTERS:
            blocks = Measurement(directory, network, rank).run()
            for row in compare(blocks, tiny_sizes(directory, rank).adapter_elements):
                found.append(row)
                print(json.dumps(row), flush=True)
    worst = max(abs(row["time_error"]) for row in found)
    bytes_worst = max(abs(row["bytes_error"]) for row in found)
    print(json.dumps({"worst_time_error": worst, "worst_bytes_error": bytes_worst, "within": worst <= TOLERANCE}))
    return 0 if worst <= TOLERANCE else 1


def count(directory: Path, modes: list[str]) -> int:
    """Bytes per step of every mode, micro batches accumulated, against the formula; as the devices count them."""
    require_root()
    directory.mkdir(parents=True, exist_ok=True)
    with Network(2) as network:
        for mode in modes or network_model.MODES:
            sizes = tiny_sizes(directory, COUNTED_RANK)
            job, output_dir = counted_job(directory, network, mode, engine_of(mode, directory))
            begin, before = reach(COUNTED_FROM, output_dir, job), sent(network)
            steps, bytes_sent = reach(begin + COUNTED_STEPS, output_dir, job) - begin, sent(network) - before
            for part in job.parts:
                part.kill_all()
                part.wait()
            payload = network_model.sent_bytes(network_model.MODES[mode](sizes), 2)
            # On an unbounded link the device counts packets before they are cut into segments: hardly any headers.
            row = {"mode": mode, "counted_bytes": round(payload), "sent_bytes": round(bytes_sent / steps)}
            row |= {"sent_over_counted": round(bytes_sent / steps / payload, 3)}
            print(json.dumps(row), flush=True)
    return 0


def engine_of(mode: str, directory: Path) -> dict[str, str]:
    """Environment that starts a mode: the shipped DeepSpeed file, but with everything divided and gathered anew.

    The tiny base is smaller than what the shipped file lets stage 3 keep.
    """
    if mode == "ddp":
        return {}
    settings = json.loads((ROOT / "configs" / "deepspeed" / f"zero{mode[-1]}.json").read_text())
    if mode == "zero-3":
        settings["zero_optimization"] |= dict.fromkeys(NOTHING_KEPT, 0)
    config = directory / f"{mode}.json"
    config.write_text(json.dumps(settings))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}


def sent(network: Network) -> float:
    """Bytes a host has sent so far, the mean of the two."""
    return statistics.mean(network.sent_bytes(number) for number in (0, 1))


def reach(step: int, output_dir: Path, job: Job) -> int:
    """Wait for a step; the one the job has come to meanwhile."""

    def ended() -> bool:
        return any(part.ended() for part in job.parts)

    wait_for(f"step {step}", lambda: len(rows(output_dir)) >= step or ended(), poll=0.05)
    assert not ended(), f"see {output_dir}-host0.log"
    return len(rows(output_dir))


def counted_job(directory: Path, network: Network, mode: str, more: dict[str, str]) -> tuple[Job, Path]:
    output_dir = directory / f"count-{mode}"
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    words = prepare(directory) | {"rank": COUNTED_RANK, "number_of_steps": 10_000, "save_every": 10_000}
    words |= {"gradient_accumulation_steps": COUNTED_ACCUMULATION}
    return Job(network, words, output_dir, f"count-{mode}", more=more), output_dir


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tables")
    commands.add_parser("measure").add_argument("directory", type=Path)
    counting = commands.add_parser("count")
    counting.add_argument("directory", type=Path)
    counting.add_argument("mode", nargs="*", choices=[[], *network_model.MODES], help="default: all")
    options = parser.parse_args()
    if options.command == "tables":
        return tables()
    if options.command == "measure":
        return measure(options.directory.resolve())
    return count(options.directory.resolve(), options.mode)


if __name__ == "__main__":
    sys.exit(main())
