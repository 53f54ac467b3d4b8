"""Packed clips: the padded computation's velocity and gradients at valid frames, and no padded frame in any layer."""

import json

import bench_packing
import pytest
import torch

from sa3dist.adapters import adapter_parameters
from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.model.packing import Packing
from sa3dist.model.token_layout import Padded
from sa3dist.training.loss import micro_batch_loss
from tests.helpers.packed_clips import FRAMES, adapted, inputs, velocity_and_gradients
from tests.helpers.recorded_step import StepSettings

MASKS = {
    "leading": torch.arange(FRAMES)[None] < torch.tensor([[7], [FRAMES], [16]]),
    "holes": torch.arange(3 * FRAMES).view(3, FRAMES) % 5 != 2,
    "one clip empty": torch.arange(FRAMES)[None] < torch.tensor([[FRAMES], [0], [3]]),
}


def padded_only(monkeypatch, base):
    """Make the network compute every frame of the padded batch, with a key mask: the oracle."""
    memory = base.dit.transformer.memory
    layouts = lambda x_BCT, mask_BT, packing: [Padded(x_BCT.shape[2], memory, mask_BT)]  # noqa: E731
    monkeypatch.setattr(base.dit, "layouts", layouts)


@pytest.mark.parametrize(
    ("mask", "kind", "with_context", "checkpointing"),
    [
        ("leading", "dora-rows", True, False),
        ("leading", "bora", False, True),
        ("holes", "lora", False, False),
        ("one clip empty", "dora-cols", True, False),
    ],
)
def test_packed_clips_equal_padded_ones_in_value_and_gradient(
    tiny_base, monkeypatch, mask, kind, with_context, checkpointing
):
    base, mask_BT = adapted(tiny_base, kind), MASKS[mask]
    weights = torch.randn(3, base.latent_channels, FRAMES, generator=torch.Generator().manual_seed(3))
    given = inputs(base, with_context)
    base.gradient_checkpointing = checkpointing
    packed = velocity_and_gradients(base, given, mask_BT, weights, packing=Packing.of(mask_BT))
    asked_on_the_spot = velocity_and_gradients(base, given, mask_BT, weights)
    base.double()
    padded_only(monkeypatch, base)
    exact = velocity_and_gradients(
        base, {name: value.double() for name, value in given.items()}, mask_BT, weights.double()
    )
    valid = mask_BT[:, None].expand_as(weights)
    for velocity, gradients in (packed, asked_on_the_spot):
        torch.testing.assert_close(velocity[valid], exact[0][valid].float(), atol=2e-5, rtol=1e-4)
        for found, expected in zip(gradients, exact[1], strict=True):
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(packed[0][~valid], torch.zeros_like(packed[0][~valid]))
    # Without a packing made ahead, padded frames hold what the reference has there.
    torch.testing.assert_close(asked_on_the_spot[0], exact[0].float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_one_local_value_stands_for_every_frame_of_all_clips_or_of_its_own(tiny_base, frames):
    base, draw = tiny_base, torch.Generator().manual_seed(4)
    mask_BT = torch.arange(frames)[None] < torch.tensor([[frames], [max(frames - 9, 0)], [frames]])
    x_BCT = torch.randn(3, base.latent_channels, frames, generator=draw)
    embeds = torch.randn(3, base.prompt_tokens, base.config.cond_dim, generator=draw)
    cross, embed = base.assemble(embeds, torch.ones(3, base.prompt_tokens), torch.tensor([3.0, 5.0, 8.0]))
    for clips in (1, 3):
        local = torch.randn(clips, base.config.dit.local_add_cond_dim, 1, generator=draw)
        given = x_BCT, torch.full((3,), 0.5), cross, embed
        for mask, packing in ((None, None), (mask_BT, None), (mask_BT, Packing.of(mask_BT))):
            short = base.dit(*given, local, mask, packing=packing)
            whole = base.dit(*given, local.expand(3, -1, frames), mask, packing=packing)
            torch.testing.assert_close(short, whole, atol=2e-5, rtol=1e-4)


def test_no_layer_sees_a_padded_frame(tiny_base):
    mask_BT = MASKS["leading"]
    base = adapted(tiny_base, "dora-rows")
    valid, memory = int(mask_BT.sum()), base.dit.transformer.memory
    seen = {}

    def record(name, channels_first):
        def hook(module, inputs, output):
            seen[name] = inputs[0].transpose(1, 2) if channels_first else inputs[0]

        return hook

    for name, module in base.dit.named_modules():
        if hasattr(module, "parametrizations"):
            module.register_forward_hook(record(name, module.channels_first))
    base.velocity(**inputs(base), padding_mask_BT=mask_BT, packing=Packing.of(mask_BT))
    per_clip = ("to_timestep_embed", "to_cond_embed", "to_global_embed", "transformer.global_cond_embedder")
    tokens = {
        name: value.shape[:-1].numel()
        for name, value in seen.items()
        if not name.startswith(per_clip) and not name.endswith("to_kv")
    }
    frames_only = ("preprocess_conv", "postprocess_conv", "project_in", "project_out")
    assert len(tokens) > 2 * len(base.dit.transformer.layers) * 4
    for name, count in tokens.items():
        on_frames = name.endswith(frames_only) or "to_local_embed" in name
        assert count == valid + (0 if on_frames else 3 * memory), name


def test_nan_in_padded_frames_reaches_neither_velocity_nor_gradient(tiny_base):
    base, mask_BT = adapted(tiny_base, "dora-rows"), MASKS["leading"]
    given, packing = inputs(base), Packing.of(MASKS["leading"])
    weights = torch.ones(3, base.latent_channels, FRAMES)
    clean = velocity_and_gradients(base, given, mask_BT, weights, packing=packing)
    for name in ("x_BDT", "inpaint_latents_BDT"):
        given[name] = torch.where(mask_BT[:, None], given[name], torch.nan)
    soiled = velocity_and_gradients(base, given, mask_BT, weights, packing=packing)
    assert torch.equal(clean[0], soiled[0])
    assert all(torch.equal(a, b) for a, b in zip(clean[1], soiled[1], strict=True))


def test_what_a_clip_is_packed_with_changes_it_by_rounding_only(tiny_base):
    base, given, mask_BT = tiny_base, inputs(tiny_base), MASKS["leading"]
    together = base.velocity(**given, padding_mask_BT=mask_BT, packing=Packing.of(mask_BT))
    for clip, length in enumerate(mask_BT.sum(1).tolist()):
        alone = {name: value[clip : clip + 1] for name, value in given.items()}
        cut = {n: v[..., :length] if v.shape[-1] == FRAMES and v.ndim == 3 else v for n, v in alone.items()}
        torch.testing.assert_close(together[clip : clip + 1, :, :length], base.velocity(**cut), atol=2e-5, rtol=1e-4)


def test_bf16_autocast_over_a_packed_batch_stays_near_float32(tiny_base):
    base, given, mask_BT = tiny_base, inputs(tiny_base), MASKS["leading"]
    packing = Packing.of(mask_BT)
    expected = base.velocity(**given, padding_mask_BT=mask_BT, packing=packing)
    for dtype in (torch.float32, torch.bfloat16):
        base.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = base.velocity(**given, padding_mask_BT=mask_BT, packing=packing)
        assert (found - expected).norm() / expected.norm() < 0.02


def test_a_packed_micro_batch_trains_as_the_padded_one(tiny_base, monkeypatch):
    base, mask_BT = adapted(tiny_base, "dora-rows"), MASKS["leading"]
    given = inputs(base)
    batch = MicroBatch(
        clips=["a", "b", "c"],
        latents_BDT=given["inpaint_latents_BDT"],
        noised_BDT=given["x_BDT"],
        target_BDT=given["x_BDT"] - given["inpaint_latents_BDT"],
        t_B=given["t_B"],
        keep_BT=mask_BT,
        inpaint_mask_B1T=given["inpaint_mask_B1T"],
        hidden_BLH=torch.randn(3, base.prompt_tokens, 768, generator=torch.Generator().manual_seed(5)),
        prompt_mask_BL=given["prompt_mask_BL"],
        seconds_total_B=given["seconds_total_B"],
        drop_cross_B=torch.tensor([False, True, False]),
        has_context=True,
        silent_crops=0,
        packing=Packing.of(mask_BT),
    ).to(torch.device("cpu"))
    parameters = list(adapter_parameters(base).values())

    def losses_and_gradients():
        losses = micro_batch_loss(base, batch, StepSettings())
        return [loss.item() for loss in losses.values()], torch.autograd.grad(losses["loss"], parameters)

    losses, gradients = losses_and_gradients()
    padded_only(monkeypatch, base)
    expected_losses, expected = losses_and_gradients()
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-9


def test_the_packing_benchmark_compares_equal_gradients(capsys):
    words = "--shape tiny-medium --depth 1 --lengths 12,6,3,3 --rank 4 --repeats 1 --device cpu"
    assert bench_packing.main(words.split()) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row["fill"] == 0.5
    assert row["losses"]["packed"] == pytest.approx(row["losses"]["padded"], rel=1e-5)
    assert 0 <= row["gradient_distance"] < 1e-4
    assert row["ratio"] == pytest.approx(row["padded_ms"] / row["packed_ms"], rel=1e-2)
