"""What must not depend on the processor: frequency tables and singular bases, as this process computes them."""

import torch

import sa3dist
from sa3dist.adapters import adapted_layers
from sa3dist.model.frequencies import expo_frequencies
from sa3dist.model.loading import load_base
from tests.helpers.golden import golden


def computed():
    """Tables and bases as this process finds them, and something that is known to differ between instructions."""
    base = load_base(golden("tiny-sa3"), encoder=False)
    sa3dist.attach_adapter(base, adapter_type="lora-xs", rank=4)
    layers = adapted_layers(base).items()
    found = {
        f"{side} {name}": getattr(layer.adapter, side) for name, layer in layers for side in ("left_OR", "right_IR")
    }
    return {"table": expo_frequencies(torch.device("cpu")), **found, "rounding": torch.linspace(0, 1, 128)}
