"""Our adapted layers against PEFT's: the linear layers of one block, forward and backward.

    python kernels/benchmarks/bench_peft.py --shape small --tokens 192 --rank 16

PEFT is a test-only dependency. Both sides have the same frozen weights and the same adapter. Outputs and input
gradients must agree before times are compared. Gradients of lora_A and lora_B are compared for LoRA only: PEFT's DoRA
treats the norm as a constant, Stable Audio 3's does not.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from bench_adapted_linear import DTYPES, SHAPES
from results_file import write_result
from sa3dist_kernels import ADAPTER_TYPES, adapted_linear, frozen_constants
from timing import interleaved, peak_bytes, summary
from torch import nn

# Largest relative difference: the sides round at different places.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Our adapter type -> whether PEFT needs use_dora.
DORA = {"lora": False, "dora-rows": True}


class OneLayer(nn.Module):
    """A module with one named layer, which PEFT can target."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layer = nn.Linear(*reversed(weight.shape), bias=bias is not None)
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.layer.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def peft_layer(weight, bias, params: dict[str, torch.Tensor], adapter_type: str) -> nn.Module:
    """PEFT's LoRA or DoRA over the layer, holding copies of ``params``."""
    import peft

    rank = params["lora_A"].shape[0]
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=["layer"], use_dora=DORA[adapter_type]
    )
    model = peft.get_peft_model(OneLayer(weight, bias), config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ours, theirs in {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "lora_magnitude_vector"}.items():
            if ours in params:
                (target,) = (value for name, value in parameters.items() if f".{theirs}." in name)
                target.copy_(params[ours])
    return model


def make_sides(fan_in, fan_out, has_bias, options, device, dtype) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Side -> one forward and backward that returns output and gradients of input, lora_A, lora_B and magnitude."""
    weight = (torch.randn(fan_out, fan_in, device=device) / fan_in**0.5).to(dtype)
    bias = torch.randn(fan_out, device=device).to(dtype) if has_bias else None
    kind = ADAPTER_TYPES[options.adapter_type]
    params = {
        name: (0.1 * torch.randn(shape, device=device)).requires_grad_()
        for name, shape in kind.parameter_shapes(fan_out, fan_in, options.rank).items()
    }
    if kind.rows:
        params["magnitude"] = (weight.float().norm(dim=1) * 1.1).requires_grad_()
    frozen = frozen_constants(weight)
    x = torch.randn(options.tokens, fan_in, device=device).to(dtype).requires_grad_()
    grad = torch.randn(options.tokens, fan_out, device=device).to(dtype)
    theirs = peft_layer(weight, bias, params, options.adapter_type)
    trained = [value for value in theirs.parameters() if value.requires_grad]
    # PEFT lists them in the order of ``params``.
    assert [value.shape for value in trained] == [value.shape for value in params.values()]

    def run(layer: Callable, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer()
        return [y, *torch.autograd.grad(y, [x, *leaves], grad)]

    def ours():
        return adapted_linear(x, weight, bias, params, kind, 1.0, frozen=frozen)

    return {
        "ours": functools.partial(run, ours, list(params.values())),
        "peft": functools.partial(run, functools.partial(theirs, x), trained),
    }


def distances(sides: dict[str, Callable]) -> list[float]:
    """Relative distances of the sides' results."""
    pairs = zip(sides["ours"](), sides["peft"](), strict=True)
    return [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]


def measure(options, device: torch.device) -> list[dict]:
    dtype = DTYPES[options.dtype]
    rows = []
    for layer, (fan_in, fan_out, has_bias) in SHAPES[options.shape].items():
        sides = make_sides(fan_in, fan_out, has_bias, options, device, dtype)
        apart = distances(sides)
        # For DoRA only output and input gradient, see above.
        assert max(apart if options.adapter_type == "lora" else apart[:2]) < TOLERANCE[dtype], (layer, apart)
        times = interleaved(sides, options.repeats, device, warm_up=2, cold=True)
        row = {"layer": layer, "fan_in": fan_in, "fan_out": fan_out, "distances": apart}
        row |= {f"{name}_ms": summary(values) for name, values in times.items()}
        row |= {f"{name}_peak_bytes": peak_bytes(run, device) for name, run in sides.items()}
        rows.append(row)
        ours, theirs = row["ours_ms"]["median"], row["peft_ms"]["median"]
        print(f"{layer:18} ours {ours:8.2f} ms  peft {theirs:8.2f} ms  {theirs / ours:5.2f}x", flush=True)
    return rows


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=192, help="rows of x: memory tokens and frames of all clips")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapter-type", choices=DORA, default="dora-rows")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: base and autocast in bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> dict:
    options = parse(words)
    torch.manual_seed(0)
    device = torch.device(options.device)
    rows = measure(options, device)
    ours, theirs = (sum(row[f"{side}_ms"]["median"] for row in rows) for side in ("ours", "peft"))
    print(f"one block of {options.shape}: ours {ours:.1f} ms, peft {theirs:.1f} ms: {theirs / ours:.2f}x")
    return write_result(options, device, ratio=theirs / ours, rows=rows)


if __name__ == "__main__":
    main()
