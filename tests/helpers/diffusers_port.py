"""The diffusers port of the network, with the weights of one of our bases."""

import math

import pytest
import torch

from sa3dist.model.frequencies import expo_frequencies


def reorder(weight, order):
    blocks = weight.chunk(len(order))
    return torch.cat([blocks[i] for i in order])


# Rows q, k, v, q', k' become q, q', k, k', v.
DIFFERENTIAL = (0, 3, 1, 4, 2)


def renamed(state, table):
    out = {}
    for key, value in state.items():
        for ours, theirs in table:
            key = key.replace(ours, theirs)
        out[key] = value
    return out


def port_features(timestep):
    """The port's own Fourier features, but of the recorded frequencies: it finds them anew, as this processor does."""
    angles = timestep.float().view(-1, 1) * expo_frequencies(timestep.device) * 2.0 * math.pi
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(timestep.dtype)


def port_of_dit(base):
    config = base.config.dit
    port = pytest.importorskip("diffusers").StableAudio3DiTModel(
        io_channels=config.io_channels,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        cond_token_dim=config.cond_token_dim,
        global_cond_dim=config.global_cond_dim,
        local_add_cond_dim=config.local_add_cond_dim,
        ff_mult=config.ff_kwargs.mult,
        num_memory_tokens=config.num_memory_tokens,
        use_differential_attention=config.attn_kwargs.differential,
    )
    table = [
        ("transformer.layers.", "transformer_blocks."),
        ("transformer.project_", "proj_"),
        ("transformer.", ""),
        (".ff.ff.0.proj.", ".ff.proj_in."),
        (".ff.ff.2.", ".ff.proj_out."),
    ]
    state = renamed(base.dit.state_dict(), table)
    if config.attn_kwargs.differential:
        for key in [key for key in state if key.endswith("self_attn.to_qkv.weight")]:
            state[key] = reorder(state[key], DIFFERENTIAL)
    state["prompt_padding_embedding"] = base.conditioner.prompt.padding_embedding
    port.load_state_dict(state)
    for name, module in port.named_modules():
        if name.endswith(("pre_norm", "cross_attend_norm", "ff_norm")):
            module.eps = 1e-5
        if type(module).__name__ == "StableAudio3ExpoFourierFeatures":
            module.forward = port_features
    return port.eval()
