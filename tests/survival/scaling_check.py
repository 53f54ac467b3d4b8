"""The scaling model against a network of known speed, and the tables it gives for real clusters.

    python tests/survival/scaling_check.py measure DIRECTORY      root: two hosts as namespaces, a few minutes
    python tests/survival/scaling_check.py tables                 no training; the tables of docs/scaling.md

`measure` trains on two hosts and changes the speed of their link while it does, back to unbounded after each change, so
that every speed is compared to steps just before and after it. For each speed and gradient size: bytes per step by the
devices' counters against the counted formula, and the step's time against the model's, which knows the unbounded step,
the gradient's size and the speed set. Ends with 1 when a prediction is off by more than 20 %.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from namespaces import Job
from network import Network, require_root
from trial import prepare, rows, wait_for

from sa3dist import scaling
from sa3dist.scaling import Cluster, Link, Sizes

MEGABITS = (5, 10, 20)
# Adapter rank: steps at each speed. Two gradient sizes, sixteen times apart.
ADAPTERS = {4: 8, 64: 4}
ROUNDS = 2
TOLERANCE = 0.2
# Gloo's messages over a veth pair: nothing beside these speeds.
VETH_LATENCY_SECONDS = 1e-4

# Bytes per second in one direction. NVLink: what NCCL's all-reduce reaches on eight H100 or H200. InfiniBand: eight
# 400 Gb/s ports per node. Ethernet: one 25 Gb/s port per node. The last two at 90 % of the wire.
CLUSTERS = {
    "NVLink + 8 x 400 Gb/s IB": Cluster(8, Link(350e9, 3e-6), Link(8 * 50e9 * 0.9, 5e-6)),
    "NVLink + 1 x 25 GbE": Cluster(8, Link(350e9, 3e-6), Link(25e9 / 8 * 0.9, 30e-6)),
}
BASES, RANKS, GPUS, COMPUTE_SECONDS = ("small-music-base", "medium-base"), (16, 128), (8, 64, 512), (0.1, 0.3, 1.0)


def sizes_of(base: str, rank: int) -> Sizes:
    """Of the default adapter over every layer of a released base."""
    import torch

    from sa3dist.adapters.select import candidate_layers
    from sa3dist.model.base import Wrapper
    from sa3dist.model.conditioners import Conditioners
    from sa3dist.model.dit import DiT
    from sa3dist.model.parse_config import parse_model_config
    from sa3dist.model.released import released_config

    config = parse_model_config(released_config(base), base)
    with torch.device("meta"):
        roots = (Wrapper(DiT(config.dit)), Conditioners(config))
    trained, layers = 0, candidate_layers(roots)
    for layer in layers.values():
        fan_out, fan_in = layer.weight.shape[:2]
        # lora_A, lora_B and one magnitude per row.
        trained += rank * (fan_in + fan_out) + fan_out
    frozen = sum(parameter.numel() for root in roots for parameter in root.parameters())
    return Sizes(trained, frozen, layers=len(layers))


def tables() -> int:
    for base in BASES:
        for rank in RANKS:
            sizes = sizes_of(base, rank)
            print(f"\n{base}, rank {rank}: {sizes.adapter_elements:,} trained, {sizes.base_elements:,} frozen values")
            for mode, count in scaling.MODES.items():
                sent = [scaling.sent_bytes(count(sizes), gpus) / 1e6 for gpus in GPUS]
                print(f"  {mode:7s} MB sent per rank and step at {GPUS}: " + "  ".join(f"{each:8.1f}" for each in sent))
            for name, cluster in CLUSTERS.items():
                for mode, count in scaling.MODES.items():
                    cells = []
                    for gpus in GPUS:
                        shares = [
                            scaling.efficiency(seconds, count(sizes), gpus, cluster) for seconds in COMPUTE_SECONDS
                        ]
                        cells.append(" / ".join(f"{100 * share:5.1f}" for share in shares))
                    print(f"  {name:25s} {mode:7s} " + "   ".join(cells))
    return 0


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
    transfers = scaling.ddp(Sizes(elements))
    payload = scaling.sent_bytes(transfers, ranks=2)
    frames = scaling.ethernet_bytes(payload, acknowledged=payload)
    found = []
    for speed in MEGABITS:
        at = [number for number, block in enumerate(blocks) if block["speed"] == speed]
        around = [second for number in at for side in (-1, 1) for second in blocks[number + side]["seconds"]]
        unbounded = statistics.median(around)
        measured = statistics.median(second for number in at for second in blocks[number]["seconds"])
        # What the speed set means for payload: it counts whole frames.
        link = Link(speed * 1e6 / 8 * payload / frames, VETH_LATENCY_SECONDS)
        predicted = scaling.step_seconds(unbounded, transfers, 2, Cluster(1, link, link))
        sent = statistics.mean(blocks[number]["sent"] for number in at)
        found.append(
            {
                "gradient_bytes": elements * scaling.FP32_BYTES,
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


def elements_of(directory: Path, network: Network, rank: int) -> int:
    """Trained values of the tiny base at this rank, from the adapter it makes."""
    from sa3dist import adapter_parameters, attach_adapter, load_base

    base = load_base(prepare(directory)["model"])
    attach_adapter(base, rank=rank)
    return sum(parameter.numel() for parameter in adapter_parameters(base).values())


def measure(directory: Path) -> int:
    require_root()
    found = []
    with Network(2) as network:
        for rank in ADAPTERS:
            blocks = Measurement(directory, network, rank).run()
            for row in compare(blocks, elements_of(directory, network, rank)):
                found.append(row)
                print(json.dumps(row), flush=True)
    worst = max(abs(row["time_error"]) for row in found)
    bytes_worst = max(abs(row["bytes_error"]) for row in found)
    print(json.dumps({"worst_time_error": worst, "worst_bytes_error": bytes_worst, "within": worst <= TOLERANCE}))
    return 0 if worst <= TOLERANCE else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tables")
    commands.add_parser("measure").add_argument("directory", type=Path)
    options = parser.parse_args()
    return tables() if options.command == "tables" else measure(options.directory.resolve())


if __name__ == "__main__":
    sys.exit(main())
