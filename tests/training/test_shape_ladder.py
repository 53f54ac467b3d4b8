"""The ladder of shapes: few rungs, little filling, and the micro batch's own losses and gradients."""

import dataclasses
import math

import pytest
import torch

from sa3dist.adapters import adapter_parameters
from sa3dist.model.packing import FilledPacking, Packing
from sa3dist.training.loss import micro_batch_loss
from sa3dist.training.shape_ladder import FACTOR, LEAST_TOKENS, ShapeLadder, rung
from tests.helpers.packed_clips import adapted
from tests.helpers.recorded_step import StepSettings, both_shapes

# Memory tokens and frames of the medium base's longest clip, 380 s.
LONGEST = 64 + 4091


def test_one_clip_of_any_length_up_to_380_seconds_has_at_most_24_shapes():
    assert len({rung(tokens, LONGEST) for tokens in range(1, LONGEST + 1)}) <= 24


@pytest.mark.parametrize("longest", [LONGEST, 4096, 1291, 257, 256, 90])
def test_rungs_hold_their_tokens_grow_with_them_and_fill_little(longest):
    before = 0
    for tokens in range(1, 4 * longest):
        found = rung(tokens, longest)
        assert found >= max(tokens, before)
        before = found
        if tokens >= LEAST_TOKENS:
            assert found <= FACTOR * tokens
        # A rung stays where it is.
        assert rung(found, longest) == found
    assert rung(longest, longest) == longest


def test_micro_batches_of_several_clips_continue_the_ladder_of_one():
    rungs = {rung(tokens, LONGEST) for tokens in range(LEAST_TOKENS, 8 * LONGEST)}
    expected = {math.ceil(LONGEST * FACTOR**step) for step in range(-23, 19)}
    assert rungs == {size for size in expected if min(rungs) <= size <= max(rungs)}
    assert len(rungs) <= 24 + math.ceil(math.log(8, FACTOR))


def losses_and_gradients(base, batch):
    losses = micro_batch_loss(base, batch, StepSettings())
    gradients = torch.autograd.grad(losses["loss"], list(adapter_parameters(base).values()))
    return [loss.detach() for loss in losses.values()], gradients


def shortened(batch, lengths):
    frames = batch.noised_BDT.shape[2]
    keep_BT = torch.arange(frames)[None] < torch.tensor(lengths)[:, None]
    return dataclasses.replace(batch, keep_BT=keep_BT, packing=Packing.of(keep_BT))


def first_clip(batch):
    values = {name: value[:1] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, clips=batch.clips[:1], **values)


def micro_batches():
    """By what is odd about them."""
    whole, _ = both_shapes()
    frames = whole.noised_BDT.shape[2]
    return {
        "whole clips": whole,
        "unequal": shortened(whole, (frames, frames - 5)),
        "both short": shortened(whole, (3, frames - 1)),
        "one clip": first_clip(whole),
        "no context": dataclasses.replace(whole, has_context=False, inpaint_mask_B1T=whole.inpaint_mask_B1T * 0),
    }


def assert_same(found, expected):
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-7)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-9


@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
@pytest.mark.parametrize("longer", [0, 9])
@pytest.mark.parametrize("name", ["whole clips", "unequal", "both short", "one clip", "no context"])
def test_a_filled_micro_batch_has_its_own_losses_and_gradients(tiny_base, name, longer):
    base, batch = adapted(tiny_base, "dora-rows"), micro_batches()[name]
    frames, memory = batch.noised_BDT.shape[2] + longer, base.dit.transformer.memory
    shaped = ShapeLadder(frames, memory)(batch)
    clips, tokens = len(batch.clips), shaped.packing.table_5K.shape[1]
    assert isinstance(shaped.packing, FilledPacking)
    assert tokens == min(rung(tokens, memory + frames), clips * (memory + frames))
    assert shaped.noised_BDT.shape == (clips, base.latent_channels, frames)
    assert_same(losses_and_gradients(base, shaped), losses_and_gradients(base, batch))


@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
def test_prompts_are_written_out_whole_and_say_the_same(tiny_base):
    base, batch = adapted(tiny_base, "dora-rows"), micro_batches()["whole clips"]
    # The last position is padding in every clip and stands for all that follow.
    mask_BL = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    short = dataclasses.replace(
        batch, hidden_BLH=batch.hidden_BLH[:, :3], prompt_mask_BL=mask_BL, prompt_length=batch.hidden_BLH.shape[1] + 4
    )
    shaped = ShapeLadder(batch.noised_BDT.shape[2], base.dit.transformer.memory)(short)
    assert shaped.hidden_BLH.shape[1] == shaped.prompt_mask_BL.shape[1] == short.prompt_length
    assert_same(losses_and_gradients(base, shaped), losses_and_gradients(base, short))


def test_micro_batches_of_any_lengths_take_few_shapes():
    whole, _ = both_shapes()
    frames, ladder = whole.noised_BDT.shape[2], ShapeLadder(whole.noised_BDT.shape[2], 4)
    lengths = [(first, second) for first in range(1, frames + 1) for second in range(1, frames + 1, 3)]
    shapes = set()
    for pair in lengths:
        shaped = ladder(shortened(whole, pair))
        tensors = {name: value.shape for name, value in vars(shaped).items() if isinstance(value, torch.Tensor)}
        shapes.add((*tensors.items(), shaped.packing.table_5K.shape, shaped.packing.start_S.shape))
    # All that one clip fills, and the rungs up to two of them.
    assert len(shapes) <= 1 + math.ceil(math.log(2, FACTOR)) < len(lengths)
