"""Base.velocity: what it assembles around the DiT."""

import pytest
import torch

from sa3dist import adapters
from sa3dist.data.batches.micro_batch import without_common_padding
from sa3dist.model.random_weights import random_base


def inputs(recorded):
    return {
        "x_BDT": recorded["dit.x"],
        "t_B": recorded["dit.t"][2],
        "prompt_embeds_BLC": recorded["prompt.embedding"][:2],
        "prompt_mask_BL": recorded["prompt.mask"][:2],
        "seconds_total_B": torch.tensor([3.0, 400.0]),
    }


def assembled(base, recorded):
    """The DiT's sequences by hand: prompt tokens, then the seconds token, which is also the global vector."""
    seconds = base.conditioner.seconds_total(torch.tensor([3.0, 384.0]), torch.float32)
    return torch.cat([recorded["prompt.embedding"][:2], seconds], dim=1), seconds[:, 0]


def test_velocity_assembles_prompt_seconds_and_masked_latents(tiny_base, recorded):
    mask, clean = recorded["dit.inpaint_mask"], torch.randn_like(recorded["dit.x"])
    padding = recorded["dit.padding_mask"]
    ours = tiny_base.velocity(
        **inputs(recorded), padding_mask_BT=padding, inpaint_mask_B1T=mask, inpaint_latents_BDT=clean
    )
    local = torch.cat([mask, clean * mask], dim=1)
    cross, embed = assembled(tiny_base, recorded)
    expected = tiny_base.dit(recorded["dit.x"], recorded["dit.t"][2], cross, embed, local, padding)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_velocity_without_inpainting_passes_zeros_not_nothing(tiny_base, recorded):
    ours = tiny_base.velocity(**inputs(recorded))
    cross, embed = assembled(tiny_base, recorded)
    x, t = recorded["dit.x"], recorded["dit.t"][2]
    zeros = tiny_base.dit(x, t, cross, embed, torch.zeros_like(recorded["dit.local_add_cond"]))
    torch.testing.assert_close(ours, zeros, atol=2e-5, rtol=1e-4)
    assert (ours - tiny_base.dit(x, t, cross, embed, None)).abs().max() > 0.1


def test_what_stands_at_padded_prompt_positions_does_not_matter(tiny_base, recorded):
    given = inputs(recorded)
    first = tiny_base.velocity(**given)
    noise = torch.full_like(given["prompt_embeds_BLC"], float("nan"))
    given["prompt_embeds_BLC"] = torch.where(given["prompt_mask_BL"][..., None], given["prompt_embeds_BLC"], noise)
    assert torch.equal(first, tiny_base.velocity(**given))


def test_dropped_clip_loses_the_whole_cross_sequence_and_keeps_the_global_vector(tiny_base, recorded):
    ours = tiny_base.velocity(**inputs(recorded), drop_cross_B=torch.tensor([False, True]))
    cross, embed = assembled(tiny_base, recorded)
    cross[1] = 0
    zeros = torch.zeros_like(recorded["dit.local_add_cond"])
    expected = tiny_base.dit(recorded["dit.x"], recorded["dit.t"][2], cross, embed, zeros)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_half_an_inpainting_input_is_refused(tiny_base, recorded):
    with pytest.raises(ValueError, match="together"):
        tiny_base.velocity(**inputs(recorded), inpaint_mask_B1T=recorded["dit.inpaint_mask"])


def test_nothing_of_a_base_learns_and_keys_are_the_files(tiny_base):
    assert not any(parameter.requires_grad for parameter in tiny_base.parameters())
    without_decoder = set(tiny_base.state_dict())
    assert without_decoder < set(tiny_base.weights.shapes)
    tiny_base.decode_latents(torch.randn(1, tiny_base.latent_channels, 2))
    assert set(tiny_base.state_dict()) == set(tiny_base.weights.shapes)


def test_seconds_keep_their_precision_in_bf16_unless_the_reference_is_asked_for(tiny_base):
    seconds = torch.tensor([12.5, 190.0])
    exact = tiny_base.conditioner.seconds_total(seconds, torch.float32)
    tiny_base.to(torch.bfloat16)
    ours = tiny_base.conditioner.seconds_total(seconds, torch.bfloat16).float()
    assert (ours - exact).norm() / exact.norm() < 0.02
    rounded = tiny_base.conditioner.seconds_total(seconds, torch.bfloat16, reference_numerics=True).float()
    assert (rounded - exact).norm() / exact.norm() > 0.3


def test_random_base_repeats_itself_and_reads_back_its_weights():
    first, second = (random_base("small-music-base", depth=1, seed=3) for _ in range(2))
    others = second.state_dict()
    assert first.state_dict().keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in first.state_dict().items())
    layer = "model.transformer.layers.0.self_attn.to_qkv"
    assert torch.equal(first.fp32_weight(layer), first.model.get_submodule(layer).weight)
    assert first.weights_digest() == second.weights_digest()


@pytest.mark.parametrize("name", ["medium-base", "small-music-base"])
def test_random_base_of_a_released_shape_keeps_its_activations_sane(name):
    base = random_base(name, depth=1, dtype=torch.bfloat16)
    assert base.latent_channels == 256
    velocity = base.velocity(
        torch.randn(1, 256, 5),
        torch.tensor([0.3]),
        torch.randn(1, 256, 768),
        torch.ones(1, 256, dtype=torch.bool),
        torch.tensor([2.0]),
    )
    assert 0.1 < velocity.std() < 10


@pytest.mark.parametrize("adapter_type", ["dora-rows", "bora"])
@pytest.mark.parametrize("drop", [None, torch.tensor([True, False])])
def test_one_position_of_padding_may_stand_for_all(tiny_base, recorded, drop, adapter_type):
    adapters.attach_adapter(tiny_base, adapter_type=adapter_type, rank=2)
    trained = adapters.adapter_parameters(tiny_base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(1.1).add_(0.05 * torch.randn(parameter.shape, generator=generator))
    tiny_base.double()
    given = inputs(recorded)
    hidden, mask = torch.randn(2, 77, 768, dtype=torch.float64), torch.arange(77) < torch.tensor([[9], [31]])
    x, t, seconds = given["x_BDT"][:2].double(), given["t_B"][:2], given["seconds_total_B"][:2]
    results = []
    for kept in ((hidden, mask), without_common_padding(hidden, mask)):
        embeds = tiny_base.embed_prompts(*kept)
        velocity = tiny_base.velocity(x, t, embeds, kept[1], seconds, drop_cross_B=drop, prompt_length=77)
        gradients = torch.autograd.grad(velocity.square().sum(), list(trained.values()), materialize_grads=True)
        results.append((velocity, *gradients))
    assert kept[1].shape == (2, 32)
    assert all(gradient.abs().max() > 0 for gradient in results[0][1:3])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prompts", ["one string", []])
def test_prompts_are_a_list_of_strings(tiny_base, prompts):
    with pytest.raises(ValueError, match="expected a list"):
        tiny_base.encode_prompts(prompts)
