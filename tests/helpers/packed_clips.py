"""A tiny base with a trained adapter, inputs of three clips, and the packed velocity with its gradients."""

import torch

import sa3dist
from sa3dist.adapters import adapter_parameters

FRAMES = 24


def adapted(base, kind):
    # The prompt projection stands before what these tests hand in.
    sa3dist.attach_adapter(base, adapter_type=kind, rank=4, exclude=["conditioners.prompt"])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(base).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return base


def inputs(base, with_context=True):
    draw = torch.Generator().manual_seed(2)
    shape = (3, base.latent_channels, FRAMES)
    given = {
        "x_BDT": torch.randn(shape, generator=draw),
        "t_B": torch.tensor([0.2, 0.5, 0.9]),
        "prompt_embeds_BLC": torch.randn(3, base.prompt_tokens, base.config.cond_dim, generator=draw),
        "prompt_mask_BL": torch.ones(3, base.prompt_tokens),
        "seconds_total_B": torch.tensor([3.0, 5.0, 8.0]),
    }
    if with_context:
        given["inpaint_mask_B1T"] = (torch.rand(3, 1, FRAMES, generator=draw) < 0.5).float()
        given["inpaint_latents_BDT"] = torch.randn(shape, generator=draw)
    return given


def velocity_and_gradients(base, given, mask_BT, weights_BDT, **how):
    """Velocity, and gradients of a random weighting of its valid frames."""
    velocity = base.velocity(**given, padding_mask_BT=mask_BT, **how)
    score = (velocity * weights_BDT).transpose(1, 2)[mask_BT].sum()
    return velocity.detach(), torch.autograd.grad(score, list(adapter_parameters(base).values()))
