"""The memory model: its estimate holds against measured activations, and decides as it says."""

import pytest
import torch

from sa3dist import plan
from sa3dist.adapters import attach_adapter
from sa3dist.model.random_weights import random_base

FRAMES = 48


def saved_bytes(base, clips: int) -> int:
    """Bytes of distinct storages kept for the backward pass of one velocity, parameters and inputs of size aside."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # Held alive, so that no address is counted for two tensors.
        return tensor

    x = torch.randn(clips, base.latent_channels, FRAMES)
    prompt = torch.randn(clips, base.prompt_tokens, base.config.cond_dim)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = base.velocity(
            x, torch.full((clips,), 0.5), prompt, torch.ones(clips, base.prompt_tokens), torch.full((clips,), 9.0)
        )
    assert velocity.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("shape", ["small-music-base", "medium-base"])
def test_the_estimate_bounds_the_measured_activations(shape):
    # Two depths: their difference is one block, free of what the ends of the network keep.
    measured = {}
    for depth in (1, 2):
        base = random_base(shape, depth=depth)
        attach_adapter(base, adapter_type="dora-rows", rank=16)
        measured[depth] = saved_bytes(base, clips=1)
    per_block = measured[2] - measured[1]
    estimate = plan.activation_bytes(base, FRAMES, clips=1, value_bytes=4) // 2
    assert per_block <= estimate <= 1.35 * per_block


class Told:
    """A base of the medium shape, for arithmetic only."""

    dtype = torch.bfloat16

    def __init__(self):
        from sa3dist.model.parse_config import parse_model_config
        from sa3dist.model.released import released_config

        self.config = parse_model_config(released_config("medium-base"), "medium")


@pytest.mark.parametrize(("free", "recompute"), [(141e9, False), (4e9, True)])
def test_auto_recomputes_only_when_the_activations_do_not_fit(monkeypatch, free, recompute):
    monkeypatch.setattr(plan, "free_bytes", lambda device: free)
    assert plan.wants_checkpointing("auto", Told(), 4091, 1, torch.device("cpu")) is recompute
    assert plan.wants_checkpointing("on", Told(), 4091, 1, torch.device("cpu")) is True
    assert plan.wants_checkpointing("off", Told(), 4091, 1, torch.device("cpu")) is False


def test_free_memory_and_peak_are_plausible():
    assert 0 < plan.free_bytes(torch.device("cpu")) < 1 << 50
    assert plan.memory_figures(torch.device("cpu"))["peak_bytes"] > 50 << 20
