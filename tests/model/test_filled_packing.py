"""Packed lists filled up to a fixed length: the packed velocity and gradients, untouched by the filling."""

import pytest
import torch

from sa3dist.model import dit, self_attention, token_layout
from sa3dist.model.packing import FilledPacking, Packing
from tests.helpers import packed_clips
from tests.helpers.packed_clips import FRAMES, adapted, inputs

LENGTHS = {"leading": (7, FRAMES, 16), "one clip empty": (FRAMES, 0, 3), "equal": (FRAMES,) * 3}


def mask_of(lengths):
    return torch.arange(FRAMES)[None] < torch.tensor(lengths)[:, None]


def filled(base, lengths, extra):
    memory = base.dit.transformer.memory
    return FilledPacking.of(lengths, memory, FRAMES, sum(memory + length for length in lengths) + extra)


def velocity_and_gradients(*arguments, **how):
    velocity, gradients = packed_clips.velocity_and_gradients(*arguments, **how)
    return [velocity, *gradients]


def weights_for(given):
    return torch.randn(given["x_BDT"].shape, generator=torch.Generator().manual_seed(3))


def one_clip(given):
    return {name: value[:1] for name, value in given.items()}


@pytest.mark.parametrize("extra", [0, 1, 13])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("with_context", [True, False])
def test_a_filled_list_gives_the_packed_lists_velocity_and_gradients(tiny_base, lengths, extra, with_context):
    base, given = adapted(tiny_base, "dora-rows"), inputs(tiny_base, with_context)
    mask_BT, weights = mask_of(lengths), weights_for(given)
    expected = velocity_and_gradients(base, given, mask_BT, weights, packing=Packing.of(mask_BT))
    found = velocity_and_gradients(base, given, mask_BT, weights, packing=filled(base, lengths, extra))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


def test_one_clip_alone_is_not_touched_by_its_filling(tiny_base):
    base, given = adapted(tiny_base, "bora"), one_clip(inputs(tiny_base))
    mask_BT, weights = mask_of([17]), weights_for(given)
    expected = velocity_and_gradients(base, given, mask_BT, weights, packing=Packing.of(mask_BT))
    found = velocity_and_gradients(base, given, mask_BT, weights, packing=filled(base, [17], 9))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


def test_huge_values_in_the_filling_change_no_bit(tiny_base, monkeypatch):
    base, given = adapted(tiny_base, "dora-rows"), inputs(tiny_base)
    mask_BT, weights = mask_of(LENGTHS["leading"]), weights_for(given)
    with_memory = token_layout.Filled.with_memory

    def run(value):
        def put_in(self, memory_ME, x_1KE):
            h_1KE = with_memory(self, memory_ME, x_1KE)
            begin = int(self.start_S[-2])
            return torch.cat([h_1KE[:, :begin], torch.full_like(h_1KE[:, begin:], value)], dim=1)

        monkeypatch.setattr(token_layout.Filled, "with_memory", put_in)
        return velocity_and_gradients(base, given, mask_BT, weights, packing=filled(base, LENGTHS["leading"], 11))

    for huge, small in zip(run(1e18), run(1.0), strict=True):
        assert torch.equal(huge, small)


def spoilt(value, begin):
    """NaN in place of the rows from ``begin`` on."""
    return value.index_fill(0, torch.arange(begin, len(value)), torch.nan)


class _SpoiltGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, begin):
        ctx.begin = begin
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return spoilt(grad, ctx.begin), None


@pytest.mark.parametrize("whole", [True, False], ids=["one function", "apart"])
def test_what_attention_leaves_where_the_filling_is_changes_no_bit(tiny_base, monkeypatch, whole):
    base, given = adapted(tiny_base, "dora-rows"), inputs(tiny_base)
    mask_BT, weights = mask_of(LENGTHS["leading"]), weights_for(given)
    begin = sum(base.dit.transformer.memory + length for length in LENGTHS["leading"])
    monkeypatch.setattr(dit, "kernel_works", lambda *_: whole)

    def run():
        return velocity_and_gradients(base, given, mask_BT, weights, packing=filled(base, LENGTHS["leading"], 11))

    attention, together = token_layout.varlen_attention, token_layout.self_attention
    gradients, calls = self_attention.attention_gradients, []

    def careless(q, k, v, q_start, k_start):
        if q_start is not k_start:
            return attention(q, k, v, q_start, k_start)
        calls.append("apart")
        q, k, v = (_SpoiltGradient.apply(value, begin) for value in (q, k, v))
        return spoilt(attention(q, k, v, q_start, k_start), begin)

    def careless_gradients(*given):
        calls.append("one function")
        return tuple(spoilt(found, begin) for found in gradients(*given))

    expected = run()
    monkeypatch.setattr(token_layout, "varlen_attention", careless)
    monkeypatch.setattr(token_layout, "self_attention", lambda *given: spoilt(together(*given), begin))
    monkeypatch.setattr(self_attention, "attention_gradients", careless_gradients)
    found = run()
    assert set(calls) == {"one function" if whole else "apart"}
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_one_function_gives_the_gradients_of_its_parts(tiny_base, monkeypatch):
    base, given = adapted(tiny_base, "dora-cols"), inputs(tiny_base)
    mask_BT, weights = mask_of(LENGTHS["leading"]), weights_for(given)

    def run(whole):
        monkeypatch.setattr(dit, "kernel_works", lambda *_: whole)
        return velocity_and_gradients(base, given, mask_BT, weights, packing=filled(base, LENGTHS["leading"], 11))

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9
