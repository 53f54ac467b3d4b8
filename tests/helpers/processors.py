"""What must not depend on the processor, as this process computes it; and compiling for this one without trying it."""

import os
import subprocess

import torch

import sa3dist
from sa3dist.adapters import adapted_layers
from sa3dist.model.frequencies import expo_frequencies
from sa3dist.model.loading import load_base
from tests.helpers.golden import golden


def trust_instructions(monkeypatch):
    """Take the instructions that the CPU names and the C++ compiler knows.

    Inductor compiles a program for each kind of them, and loads it in a process that imports torch first.
    """
    from torch._inductor import cpp_builder, cpu_vec_isa

    def known(isa, _):
        command = [cpp_builder.get_cpp_compiler(), *isa._arch_flags.split(), "-E", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", known)


def computed():
    """Tables and bases as this process finds them, and something that is known to differ between instructions."""
    base = load_base(golden("tiny-sa3"), encoder=False)
    sa3dist.attach_adapter(base, adapter_type="lora-xs", rank=4)
    layers = adapted_layers(base).items()
    found = {
        f"{side} {name}": getattr(layer.adapter, side) for name, layer in layers for side in ("left_OR", "right_IR")
    }
    return {"table": expo_frequencies(torch.device("cpu")), **found, "rounding": torch.linspace(0, 1, 128)}
