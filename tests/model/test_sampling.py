"""The inference schedule, guidance and Euler previews against the reference's recorded tensors."""

import pytest
import torch

import sa3dist
from sa3dist.model.sampling import (
    Guidance,
    euler,
    guided_velocity,
    logsnr_schedule,
    negative_cross,
    ping_pong,
    sample,
)

# tests/golden/tiny-sa3/README.md
GUIDED = {"atol": 2e-4, "rtol": 1e-3}


def test_schedule_is_the_references(recorded):
    torch.testing.assert_close(logsnr_schedule(8), recorded["schedule.logsnr.8"], rtol=0, atol=1e-7)
    torch.testing.assert_close(logsnr_schedule(8, 0.7), recorded["schedule.logsnr.8.sigma07"], rtol=0, atol=1e-7)
    torch.testing.assert_close(logsnr_schedule(6), recorded["sample.sigmas"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "guidance", "masked", "negative"),
    [
        ("apg1", Guidance(4), False, False),
        ("apg0", Guidance(4, apg=0.0), False, False),
        ("apg05", Guidance(4, apg=0.5), False, False),
        ("apg1_rescale", Guidance(4, rescale=0.7), False, False),
        ("apg1_negative", Guidance(4), False, True),
        ("apg1_pad_varlen", Guidance(4), True, False),
    ],
)
def test_guided_velocity_is_the_references(tiny_base, recorded, name, guidance, masked, negative):
    keep = recorded["dit.padding_mask"] if masked else None
    null = negative_cross(recorded["cfg.negative_cross_attn_cond"], recorded["cfg.negative_cross_attn_mask"])
    ours = torch.stack(
        [
            guided_velocity(
                tiny_base.dit,
                recorded["dit.x"],
                t_B,
                recorded["dit.cross_attn_cond"],
                recorded["dit.global_cond"],
                recorded["dit.local_add_cond"],
                guidance,
                keep,
                null if negative else None,
            )
            for t_B in recorded["dit.t"][1:]
        ]
    )
    torch.testing.assert_close(ours, recorded[f"cfg.v.{name}"], **GUIDED)


def test_euler_sampling_with_guidance_is_the_references(tiny_base, recorded):
    def velocity(x, t_B):
        cross, embed = recorded["dit.cross_attn_cond"], recorded["dit.global_cond"]
        local = tiny_base.local_conditioning(None, None)
        return guided_velocity(tiny_base.dit, x, t_B, cross, embed, local, Guidance(3))

    latents = euler(velocity, recorded["sample.noise"], recorded["sample.sigmas"])
    torch.testing.assert_close(latents, recorded["sample.latents"], **GUIDED)


def test_scale_one_is_the_conditional_velocity_alone(tiny_base, recorded):
    given = (
        recorded["dit.x"],
        recorded["dit.t"][1],
        recorded["dit.cross_attn_cond"],
        recorded["dit.global_cond"],
        None,
    )
    assert torch.equal(guided_velocity(tiny_base.dit, *given, Guidance(1)), tiny_base.dit(*given))


def test_a_prompt_differs_from_its_negative_and_repeats(demo_base):
    base = sa3dist.load_base(demo_base)
    noise = torch.randn(1, base.latent_channels, 6)
    drum, hiss = base.encode_prompts(["a bass drum"]), base.encode_prompts(["hiss"])
    first, again, steered = (
        sample(base, lambda step: noise, drum, 0.5, 3, Guidance(7), negative) for negative in (None, None, hiss)
    )
    assert first.shape == noise.shape
    assert torch.equal(first, again)
    assert (first - steered).abs().max() > 1e-3


def test_a_post_trained_model_noises_its_estimate_again_after_every_step_but_the_last():
    schedule, start, fresh = torch.tensor([1.0, 0.6, 0.2, 0.0]), torch.tensor([[[2.0]]]), {1: 0.5, 2: -1.0}
    asked = []

    def velocity(x, t_B):
        asked.append((x.item(), t_B.item()))
        return 0.3 * x

    found = ping_pong(velocity, start, schedule, lambda step: torch.full_like(start, fresh[step]))
    # Written out: x0 = (1 - 0.3 t) x, then x = (1 - t') x0 + t' noise.
    second = 0.4 * (0.7 * 2.0) + 0.6 * 0.5
    third = 0.8 * (1 - 0.3 * 0.6) * second + 0.2 * -1.0
    assert asked == [pytest.approx(pair) for pair in ((2.0, 1.0), (second, 0.6), (third, 0.2))]
    assert found.item() == pytest.approx((1 - 0.3 * 0.2) * third)
