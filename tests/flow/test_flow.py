"""The training step's pure functions against the reference's recorded steps and against closed forms."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sa3dist import flow
from tests.helpers.golden import GOLDEN

DRAWS, MASKS, LONG_MASKS = 100_000, 40_000, 30_000


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "training/golden.safetensors")


@pytest.fixture(scope="module")
def described():
    return json.loads((GOLDEN / "training/golden.json").read_text())


def _step(recorded, name):
    return {key.split("/")[1]: value for key, value in recorded.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", ["full_mask_b1", "mixed_b4", "ot_b8"])
def test_a_step_equals_the_reference(recorded, described, name):
    step = _step(recorded, name)
    permutation = flow.couple_noise(step["latents"], step["noise"])
    assert permutation.tolist() == step["ot_permutation"].tolist()
    frames = torch.tensor([flow.effective_frames(float(s), 44100, 4096) for s in step["seconds_total"]])
    assert frames.tolist() == described["steps"][name]["effective_seq_len"]
    t = flow.shift_timesteps(1 - step["t_sampler"], frames)
    assert torch.equal(t, step["t_shifted"])
    noised, target = flow.noise_latents(step["latents"], step["noise"][permutation], t)
    torch.testing.assert_close(noised, step["noised"], atol=1e-6, rtol=1e-6)
    assert torch.equal(target, step["target"])
    prediction = step["prediction"].requires_grad_()
    keep = step["augmented_padding_mask"].bool()
    loss, generated, context = flow.masked_loss(prediction, target, keep, step["inpaint_mask"])
    loss.backward()
    expected = described["steps"][name]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert generated.item() == pytest.approx(expected["signal_term"], rel=1e-6)
    assert context.item() == pytest.approx(expected["context_term"], rel=1e-6)
    torch.testing.assert_close(prediction.grad, step["grad.prediction"], atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 256, 646, 1291, 2048, 4096, 9000])
def test_the_shift_equals_the_reference_at_every_length(recorded, frames):
    shifted = flow.shift_timesteps(recorded["shift/t"], torch.full((9,), frames))
    torch.testing.assert_close(shifted, recorded[f"shift/L{frames}"], atol=2e-7, rtol=0)


def test_the_shift_takes_each_clips_own_length(recorded):
    shifted = flow.shift_timesteps(recorded["shift/t"], recorded["shift/per_element_L"])
    torch.testing.assert_close(shifted, recorded["shift/per_element_t"], atol=2e-7, rtol=0)


def test_the_shift_keeps_both_ends():
    ends = torch.tensor([0.0, 1.0])
    assert flow.shift_timesteps(ends, torch.tensor([4096, 17])).tolist() == [0.0, 1.0]


def test_timesteps_follow_the_truncated_logit_normal():
    from scipy import stats

    # w = sigmoid(n) given w <= 0.925, t = w / 0.925: its distribution function in closed form.
    def cdf(t):
        w = 0.925 * t
        return stats.norm.cdf([math.log(x / (1 - x)) for x in w]) / stats.norm.cdf(math.log(0.925 / 0.075))

    t = flow.sample_timesteps(DRAWS, torch.Generator().manual_seed(5)).numpy()
    assert stats.kstest(t, cdf).pvalue > 1e-3
    assert t.dtype == "float32"
    assert t.min() > 0
    assert t.max() <= 1


def test_timesteps_drawn_slot_by_slot_follow_the_same_distribution(described):
    t = torch.cat([flow.sample_timesteps(1, flow.generator_for(7, "timestep", slot)) for slot in range(20_000)])
    closed = described["timestep_sampler"]["closed_form_quantiles_after_flip"]
    for probability, value in closed.items():
        share = (t <= value).float().mean().item()
        spread = math.sqrt(float(probability) * (1 - float(probability)) / len(t))
        assert abs(share - float(probability)) < 4.5 * spread


def test_silence_extensions_are_floored_exponentials(described):
    scale = described["silence_extension"]["scale_latents"]
    generator = torch.Generator().manual_seed(11)
    drawn = torch.tensor([flow.draw_extension(scale, generator) for _ in range(DRAWS)], dtype=torch.float64)
    # The floor of an exponential is geometric: P(e >= k) = exp(-k / scale).
    success = 1 - math.exp(-1 / scale)
    mean, deviation = (1 - success) / success, math.sqrt(1 - success) / success
    assert abs(drawn.mean().item() - mean) < 4 * deviation / math.sqrt(DRAWS)
    for k in (1, 2, 12, 29, 59, 128, 198):
        tail = math.exp(-k / scale)
        assert abs((drawn >= k).double().mean().item() - tail) < 4.5 * math.sqrt(tail * (1 - tail) / DRAWS)


def test_degenerate_arguments_have_their_limits():
    assert flow.draw_extension(0, torch.Generator()) == 0
    one_length = flow.shift_timesteps(torch.tensor([0.3]), torch.tensor([9]), min_length=256, max_length=256)
    torch.testing.assert_close(one_length, flow.shift_timesteps(torch.tensor([0.3]), torch.tensor([256])))


@pytest.fixture(scope="module")
def masks():
    """Masks of 40 valid frames in 50: few enough frames to enumerate what each type can give."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([flow.draw_inpaint_mask(40, 50, generator) for _ in range(MASKS)])


def test_inpainting_masks_never_give_padding_as_context(masks):
    assert masks[:, 40:].sum() == 0
    assert set(masks.unique().tolist()) == {0.0, 1.0}


def test_inpainting_mask_types_have_their_shares(masks):
    context = masks[:, :40]
    lengths = context.sum(1)
    # A causal mask with prefix 0 looks full; one with p = 40 masks nothing; segments rarely look like either.
    looks_full = (lengths == 0).double().mean().item()
    assert abs(looks_full - (0.8 + 0.1 / 41)) < 0.005
    prefix = (context.cumprod(1).sum(1) == lengths) & (lengths > 0)
    causal_only_lengths = torch.bincount(lengths[prefix].long(), minlength=41)[1:8].double() / MASKS
    # Prefixes this short are out of reach for most segment masks: about 0.1 / 41 each.
    assert (causal_only_lengths - 0.1 / 41).abs().max() < 0.001


def test_random_segments_have_the_recorded_statistics(described):
    expected = described["inpaint_masks"]["RANDOM_SEGMENTS"]
    generator = torch.Generator().manual_seed(9)
    fractions, runs = [], []
    for _ in range(LONG_MASKS):
        context = flow.draw_inpaint_mask(1000, 1291, generator)[:1000]
        edges = int((context.diff() != 0).sum()) + int(context[0] == 0)
        # Segment masks are those that are neither full nor a prefix of ones.
        if context.sum() > 0 and int(context.cumprod(0).sum()) != int(context.sum()):
            fractions.append(1 - context.mean().item())
            runs.append((edges + int(context[-1] == 0)) / 2)
    fractions, runs = torch.tensor(fractions), torch.tensor(runs)
    assert abs(len(runs) / LONG_MASKS - 0.1) < 0.006
    assert fractions.mean().item() == pytest.approx(expected["masked_fraction_of_real"]["mean"], abs=0.012)
    assert fractions.std().item() == pytest.approx(expected["masked_fraction_of_real"]["std"], abs=0.01)
    assert runs.mean().item() == pytest.approx(expected["masked_runs"]["mean"], abs=0.12)


def test_a_clip_without_valid_frames_keeps_ones_unless_full():
    generator = torch.Generator().manual_seed(1)
    sums = {flow.draw_inpaint_mask(0, 6, generator).sum().item() for _ in range(200)}
    assert sums == {0.0, 6.0}


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 33))
@settings(deadline=None, max_examples=60)
def test_noise_of_a_short_clip_is_a_prefix_of_the_noise_of_a_long_one(frames, more, channels):
    short = flow.draw_noise(frames, channels, flow.generator_for(1, "noise", 5))
    long = flow.draw_noise(frames + more, channels, flow.generator_for(1, "noise", 5))
    assert torch.equal(long[:, :frames], short)


def test_noise_is_standard_normal():
    from scipy import stats

    noise = flow.draw_noise(500, 256, flow.generator_for(2, "noise", 0)).flatten().numpy()
    assert stats.kstest(noise, "norm").pvalue > 1e-3


def test_streams_of_different_names_are_unrelated():
    def draw(*name):
        return torch.rand(4, generator=flow.generator_for(*name))

    assert torch.equal(draw(1, "noise", 2), draw(1, "noise", 2))
    others = [
        draw(1, "noise", 3),
        draw(2, "noise", 2),
        draw(1, "crop", 2),
        draw(1, "noise", 2, 1),
        draw(12, "noise", 2),
    ]
    assert all(not torch.equal(draw(1, "noise", 2), other) for other in others)


@given(st.integers(1, 8), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_coupling_is_a_permutation(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(batch, 3, 11, generator=generator) for _ in range(2))
    assert sorted(flow.couple_noise(latents, noise).tolist()) == list(range(batch))


def test_the_loss_ignores_frames_that_do_not_count():
    generator = torch.Generator().manual_seed(4)
    velocity, target = (torch.randn(3, 5, 9, generator=generator) for _ in range(2))
    keep = torch.arange(9)[None] < torch.tensor([9, 4, 1])[:, None]
    context = (torch.rand(3, 1, 9, generator=generator) < 0.5).float()
    plain = flow.masked_loss(velocity, target, keep, context, context_weight=0.3)
    spoiled = torch.where(keep[:, None], velocity, torch.nan).requires_grad_()
    guarded = flow.masked_loss(spoiled, target, keep, context, context_weight=0.3)
    guarded[0].backward()
    assert [x.item() for x in plain] == [x.item() for x in guarded]
    assert spoiled.grad.isfinite().all()
    expected = 0.0
    for clip in range(3):
        for part, weight in ((keep[clip] & (context[clip, 0] == 0), 1.0), (keep[clip] & (context[clip, 0] == 1), 0.3)):
            if part.any():
                expected += weight * (velocity - target)[clip][:, part].double().square().mean().item() / 3
    assert plain[0].item() == pytest.approx(expected, rel=1e-6)


BDT = 4, 3, 5
ARGUMENTS = {
    flow.noise_latents: {"latents_BDT": BDT, "noise_BDT": BDT, "t_B": (4,)},
    flow.couple_noise: {"latents_BDT": BDT, "noise_BDT": BDT},
    flow.masked_loss: {"velocity_BDT": BDT, "target_BDT": BDT, "keep_BT": (4, 5), "inpaint_mask_B1T": (4, 1, 5)},
    flow.shift_timesteps: {"t_B": (4,), "frames_B": (4,)},
}
# Every axis of every tensor but the first one: one element, which torch would broadcast, or one too many.
WRONG = [
    (function, name, axis, size)
    for function, shapes in ARGUMENTS.items()
    for name, shape in list(shapes.items())[1:]
    for axis, right in enumerate(shape)
    for size in {1, right + 1} - {right}
]


def tensors(shapes):
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("function", "name", "axis", "size"), WRONG)
def test_a_tensor_of_another_batch_or_length_is_refused_by_name_not_broadcast(function, name, axis, size):
    shape = list(ARGUMENTS[function][name])
    shape[axis] = size
    with pytest.raises(ValueError, match=f"^{name} has shape .*{size}.*, expected "):
        function(**tensors(ARGUMENTS[function] | {name: shape}))


@pytest.mark.parametrize("function", [flow.noise_latents, flow.masked_loss, flow.shift_timesteps])
def test_shapes_are_checked_in_one_compiled_graph_for_all_lengths(function):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=count, fullgraph=True, dynamic=True)
    for length in (5, 7, 9):
        sizes = {4: 4, 3: 3, 1: 1, 5: length}
        values = tensors({name: [sizes[n] for n in shape] for name, shape in ARGUMENTS[function].items()})
        torch.testing.assert_close(compiled(**values), function(**values))
    assert len(graphs) == 1
