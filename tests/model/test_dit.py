"""The DiT and the conditioners against the reference's recorded tensors, and what the padding mask promises."""

import pytest
import torch

from sa3dist.model.blocks import RotaryEmbedding, expo_features
from sa3dist.model.frequencies import expo_frequencies

# tests/golden/tiny-sa3/README.md
DIT = {"atol": 2e-5, "rtol": 1e-4}
SMALL = {"atol": 1e-5, "rtol": 0}


def assert_near(found, expected):
    """Elementwise as the recording suggests, and as a whole to float32 rounding: 4e-7 at most on three processors."""
    torch.testing.assert_close(found, expected, **DIT)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def local_input(recorded, kind):
    given = recorded["dit.local_add_cond"]
    return {"none": None, "zero": torch.zeros_like(given), "inpaint": given}[kind]


def velocity(base, recorded, row, local="inpaint", mask="nomask", cross=None):
    padding = recorded["dit.padding_mask"] if mask == "pad_varlen" else None
    cross = recorded["dit.cross_attn_cond"] if cross is None else cross
    given = local_input(recorded, local)
    return base.dit(recorded["dit.x"], recorded["dit.t"][row], cross, recorded["dit.global_cond"], given, padding)


@pytest.mark.parametrize("mask", ["nomask", "pad_varlen"])
@pytest.mark.parametrize("local", ["none", "zero", "inpaint"])
def test_velocity_is_the_references(tiny_base, recorded, local, mask):
    ours = torch.stack([velocity(tiny_base, recorded, row, local, mask) for row in range(4)])
    assert_near(ours, recorded[f"dit.v.{local}.{mask}"])


def test_unconditional_velocity_is_the_references(tiny_base, recorded):
    zeros = torch.zeros_like(recorded["dit.cross_attn_cond"])
    ours = torch.stack([velocity(tiny_base, recorded, row, cross=zeros) for row in range(4)])
    assert_near(ours, recorded["dit.v.uncond.inpaint.nomask"])


def test_residual_stream_after_every_layer_is_the_references(tiny_base, recorded):
    seen = []
    for layer in tiny_base.dit.transformer.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    velocity(tiny_base, recorded, 1)
    for i, stream in enumerate(seen):
        assert_near(stream, recorded[f"dit.hidden.{i}"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mask", ["nomask", "pad_varlen"])
def test_gradients_are_the_references(tiny_base, recorded, mask, checkpointing):
    tiny_base.requires_grad_(True)
    tiny_base.gradient_checkpointing = checkpointing
    error = (velocity(tiny_base, recorded, 1, mask=mask) - recorded["grad.target"]).square()
    if mask == "pad_varlen":
        error = error.transpose(1, 2)[recorded["dit.padding_mask"]]
    loss = error.mean()
    loss.backward()
    prefix = f"grad.{mask}."
    torch.testing.assert_close(loss.detach()[None], recorded[f"{prefix}loss"], rtol=1e-4, atol=0)
    gradients = {name: value.grad for name, value in tiny_base.dit.named_parameters() if value.grad is not None}
    total = torch.linalg.vector_norm(torch.stack([value.norm() for value in gradients.values()]))
    torch.testing.assert_close(total[None], recorded[f"{prefix}total_norm"], rtol=1e-3, atol=0)
    names = {key.removeprefix(prefix) for key in recorded if key.startswith(prefix)} - {"loss", "total_norm"}
    assert len(names) == 6
    for name in names:
        expected = recorded[prefix + name]
        torch.testing.assert_close(gradients[name], expected, rtol=0, atol=1e-3 * expected.abs().max().item())


def test_masked_clip_equals_itself_cut_to_length(tiny_base, recorded):
    valid = int(recorded["dit.padding_mask"][1].sum())
    assert valid < recorded["dit.x"].shape[2]
    together = velocity(tiny_base, recorded, 2, mask="pad_varlen")[1:, :, :valid]
    alone = tiny_base.dit(
        recorded["dit.x"][1:, :, :valid],
        recorded["dit.t"][2][1:],
        recorded["dit.cross_attn_cond"][1:],
        recorded["dit.global_cond"][1:],
        recorded["dit.local_add_cond"][1:, :, :valid],
    )
    torch.testing.assert_close(together, alone, **DIT)


def test_content_of_padded_frames_reaches_no_valid_frame(tiny_base, recorded):
    mask = recorded["dit.padding_mask"]
    first = velocity(tiny_base, recorded, 2, mask="pad_varlen")
    changed = dict(recorded)
    changed["dit.x"] = torch.where(mask[:, None], recorded["dit.x"], 1e3 * torch.randn_like(recorded["dit.x"]))
    second = velocity(tiny_base, changed, 2, mask="pad_varlen")
    kept = mask[:, None].expand_as(first)
    torch.testing.assert_close(first[kept], second[kept], rtol=0, atol=0)
    assert (first - second)[~kept].abs().max() > 1


def test_frames_of_a_clip_without_valid_ones_have_their_velocity_also_where_no_clip_has_any(tiny_base, recorded):
    given = [recorded[f"dit.{name}"] for name in ("x", "t", "cross_attn_cond", "global_cond", "local_add_cond")]
    given[1] = given[1][1]
    mask = torch.zeros_like(recorded["dit.padding_mask"])
    nothing = tiny_base.dit(*given, mask)
    mask[0] = True
    torch.testing.assert_close(nothing[1], tiny_base.dit(*given, mask)[1], rtol=0, atol=1e-6)
    assert nothing.abs().sum() > 0
    given[0], given[4] = given[0][..., :0], given[4][..., :0]
    assert tiny_base.dit(*given).shape == given[0].shape


def test_mask_without_padding_equals_no_mask(tiny_base, recorded):
    everything = dict(recorded, **{"dit.padding_mask": torch.ones_like(recorded["dit.padding_mask"])})
    ours = velocity(tiny_base, everything, 0, mask="pad_varlen")
    torch.testing.assert_close(ours, velocity(tiny_base, recorded, 0), **DIT)


def test_fourier_features_are_the_references(tiny_base, recorded):
    assert torch.equal(expo_frequencies(torch.device("cpu")), recorded["expo.freqs"])
    # Sine and cosine are the machine's own: each within one unit in the last place.
    torch.testing.assert_close(expo_features(recorded["expo.t"]), recorded["expo.features"], rtol=0, atol=1.2e-7)
    embed = tiny_base.dit.to_timestep_embed(tiny_base.dit.timestep_features(recorded["expo.t"]))
    assert_near(embed, recorded["dit.timestep_embed"])


def test_recorded_frequencies_follow_the_formula():
    expected = 0.5 * 20000 ** torch.linspace(0, 1, 128, dtype=torch.float64)
    # Exponents of up to 9.2, rounded to float32 three times, are off by up to 1.5e-6.
    torch.testing.assert_close(expo_frequencies(torch.device("cpu")).double(), expected, rtol=1.5e-6, atol=0)


def test_number_and_prompt_conditioners_are_the_references(tiny_base, recorded):
    number = tiny_base.conditioner.seconds_total(recorded["number.seconds"], torch.float32)
    torch.testing.assert_close(number, recorded["number.embedding"], **SMALL)
    prompt = tiny_base.embed_prompts(recorded["prompt.hidden_states"], recorded["prompt.mask"])
    torch.testing.assert_close(prompt, recorded["prompt.embedding"], **SMALL)
    # Padding is filled in again wherever the embeddings are used: a second time must change nothing.
    again = tiny_base.conditioner.prompt.fill_padding(prompt, recorded["prompt.mask"])
    assert torch.equal(again, prompt)


@pytest.mark.parametrize("mode", ["zero", "none"])
def test_other_padding_modes_zero_or_keep_the_projection(tiny_base, recorded, mode):
    conditioner = tiny_base.conditioner.prompt
    conditioner.padding_mode = mode
    hidden, mask = recorded["prompt.hidden_states"], recorded["prompt.mask"]
    expected = hidden @ conditioner.proj_out.weight.T + conditioner.proj_out.bias
    if mode == "zero":
        expected = expected * mask[..., None]
    torch.testing.assert_close(tiny_base.embed_prompts(hidden, mask), expected, **SMALL)


def test_casting_the_base_never_touches_rotary_frequencies(tiny_base):
    exact = [module.inv_freq.clone() for module in tiny_base.modules() if isinstance(module, RotaryEmbedding)]
    tiny_base.to(torch.bfloat16).half()
    casted = [module.inv_freq for module in tiny_base.modules() if isinstance(module, RotaryEmbedding)]
    assert len(exact) > 1
    assert all(new.dtype == torch.float32 and torch.equal(new, old) for new, old in zip(casted, exact, strict=True))


def test_bf16_velocity_stays_near_the_reference_and_rounding_t_does_not(tiny_base, recorded):
    tiny_base.to(torch.bfloat16)
    expected = recorded["dit.v.inpaint.nomask"]

    def distance():
        ours = torch.stack([velocity(tiny_base, recorded, row) for row in range(4)])
        assert ours.dtype == torch.float32
        return ((ours - expected).norm() / expected.norm()).item()

    exact_features = distance()
    assert exact_features < 0.02
    tiny_base.reference_numerics = True
    assert distance() > 3 * exact_features


def test_autocast_over_a_float32_or_bf16_base_agrees_with_float32(tiny_base, recorded):
    expected = recorded["dit.v.inpaint.pad_varlen"][1]
    for dtype in (torch.float32, torch.bfloat16):
        tiny_base.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            ours = velocity(tiny_base, recorded, 1, mask="pad_varlen")
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() / expected.norm() < 0.02
