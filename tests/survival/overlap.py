"""What it gains that gradients leave during the backward pass: two hosts over a shaped link, buckets against one piece.

    python tests/survival/overlap.py [--megabits 100] [--backward 0.5] [--elements 2000000]      (root)

The backward pass sleeps in place of computing, as a CPU does that waits for its GPU; the gradients, the buckets and
the link are real. Prints one JSON line per link: seconds of a step that sends one piece, of one that sends buckets,
and the gain, which at best is the shorter of computing and sending.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import network
import torch
import torch.distributed as dist
from torch import nn

from sa3dist.parallel.flat_adamw import FlatAdapters
from sa3dist.parallel.gradient_buckets import GradientReduction
from sa3dist.runtime.process_group import Group

LAYERS, ROUNDS, PORT = 32, 4, 29655


class Layer(torch.autograd.Function):
    """Passes its input on; its backward pass takes a while and gives a parameter a gradient."""

    @staticmethod
    def forward(ctx, x, parameter, seconds):
        ctx.save_for_backward(parameter)
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (parameter,) = ctx.saved_tensors
        time.sleep(ctx.seconds)
        return grad, torch.full_like(parameter, grad.item()), None


def rank(number: int, elements: int, backward: float) -> None:
    dist.init_process_group("gloo", rank=number, world_size=2)
    medians = {}
    for name, bucket in (("whole", elements + 1), ("buckets", elements // 8)):
        parameters = {f"layer.{n}": nn.Parameter(torch.zeros(elements // LAYERS)) for n in range(LAYERS)}
        flat = FlatAdapters(parameters, 0.1, 0.0, scalars=8)
        reduction = GradientReduction(flat, Group(number, 2, torch.device("cpu")), "none", bucket)
        seconds = []
        for _ in range(ROUNDS):
            dist.barrier()
            begin = time.perf_counter()
            flat.zero()
            reduction.reset()
            x = torch.ones((), requires_grad=True)
            for parameter in parameters.values():
                x = Layer.apply(x, parameter, backward / LAYERS)
            reduction.begin_last_backward()
            x.backward()
            reduction.finish()
            seconds.append(time.perf_counter() - begin)
            assert torch.equal(flat.gradient, torch.ones_like(flat.gradient))
        medians[name] = statistics.median(seconds[1:])
    if number == 0:
        print(json.dumps(medians), flush=True)


def measure(net: network.Network, elements: int, backward: float) -> dict:
    started = []
    for number in (0, 1):
        environment = {"MASTER_ADDR": net.address(0), "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": network.DEVICE}
        words = [
            sys.executable,
            __file__,
            "--rank",
            str(number),
            "--elements",
            str(elements),
            "--backward",
            str(backward),
        ]
        started.append(
            subprocess.Popen(net.on(number, words), env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        )
    said = [process.communicate()[0] for process in started]
    return json.loads(said[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabits", type=float, nargs="*", default=[100])
    parser.add_argument("--elements", type=int, default=2_000_000, help="trained values; buckets hold an eighth")
    parser.add_argument("--backward", type=float, default=0.5, help="seconds of the last backward pass")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank(arguments.rank, arguments.elements, arguments.backward)
        return 0
    network.require_root()
    # Names of its own: another measurement may be under way.
    network.SWITCH, network.BRIDGE, network.SUBNET = "sa3o-switch", "sa3obr", "10.213.78"
    net = network.Network(2)
    net.nodes = ["sa3o-0", "sa3o-1"]
    with net:
        for megabits in arguments.megabits:
            net.throttle(megabits)
            row = measure(net, arguments.elements, arguments.backward)
            # Two ranks exchange each half of the buffer twice: every rank sends all of it once.
            row |= {"megabits": megabits, "sending_seconds": arguments.elements * 4 * 8 / (megabits * 1e6)}
            row |= {"backward_seconds": arguments.backward, "gain": 1 - row["buckets"] / row["whole"]}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
