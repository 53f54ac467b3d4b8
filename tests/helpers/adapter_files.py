"""Adapter files over the demo's tiny base, moved off their initial values, and an oracle of what they mean."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import sa3dist
from sa3dist.adapters import attach_adapter, detach_adapter, read_adapter_file, save_adapter
from tests.helpers.adapter_base import move

SLOT = "parametrizations.weight.0"


def make_adapter(base, path: Path, seed: int, **settings) -> Path:
    """Write an adapter of ``base`` with every value moved; leaves the base as it was."""
    attach_adapter(base, seed=seed, **settings)
    move(base, seed)
    save_adapter(
        base, path, metadata={"base_sha256": base.weights_digest(), "base_model": str(base.weights.path.parent)}
    )
    detach_adapter(base)
    return path


def base_key(layer: str) -> str:
    return f"{'conditioner' if layer.startswith('conditioners.') else 'model'}.{layer}.weight"


def changes(base_dir: Path, path: Path) -> dict[str, torch.Tensor]:
    """Layer -> W' - W0 as a float64 matrix, written down from the specification's formulas, -xs types aside."""
    weights, file = load_file(base_dir / "model.safetensors"), read_adapter_file(path)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        layer, _, tensor = key.partition(f".{SLOT}.")
        layers.setdefault(layer, {})[tensor] = value.double()
    result = {}
    for layer, trained in layers.items():
        before = weights[base_key(layer)].double().flatten(1)
        after = before + file.config.alpha / file.config.rank * trained["lora_B"] @ trained["lora_A"]
        kind = file.config.adapter_type
        if kind == "dora-rows":
            after = trained["magnitude"][:, None] * after / after.norm(dim=1, keepdim=True)
        if kind == "dora-cols":
            after = trained["magnitude"] * after / after.norm(dim=0)
        if kind == "bora":
            after = trained["magnitude_r"][:, None] * after / after.norm(dim=1, keepdim=True)
            after = trained["magnitude_c"] * after / after.norm(dim=0)
        result[layer] = after - before
    return result


def velocity_of(base) -> torch.Tensor:
    """What the network answers to some input."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(1, base.latent_channels, 20, generator=draw)
    prompt = torch.randn(1, base.prompt_tokens, base.config.cond_dim, generator=draw)
    with torch.no_grad():
        return base.velocity(x, torch.tensor([0.4]), prompt, torch.ones(1, base.prompt_tokens), torch.tensor([9.0]))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def load(directory: Path):
    return sa3dist.load_base(directory, encoder=False)
