"""Attention of clips in one list: by cuDNN against float32; what the compiler is told of results."""

import pytest
import torch
import torch.nn.functional as F

from sa3dist.model import cudnn_attention
from sa3dist.model import varlen_attention as varlen

HEADS, WIDTH = 3, 64


def test_where_cudnn_has_no_such_kernel_there_is_none_and_the_log_says_why_once(caplog):
    caplog.set_level("INFO")
    cudnn_attention._built.cache_clear()
    cudnn_attention._log_once.cache_clear()
    for tokens in (5, 6):
        q = torch.zeros(1, HEADS, tokens, WIDTH, dtype=torch.bfloat16)
        assert cudnn_attention.cudnn_attention(q, q, q, True) is None
    (said,) = caplog.messages
    assert said.startswith("attention uses torch's kernels")


def test_kernels_of_a_run_that_may_round_as_it_likes_are_not_those_of_a_deterministic_one(monkeypatch):
    built = []
    monkeypatch.setattr(cudnn_attention.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cudnn_attention, "CudnnAttention", lambda *given: built.append(given[4]) or object())
    cudnn_attention._built.cache_clear()
    q = torch.zeros(1, HEADS, 5, WIDTH, dtype=torch.bfloat16)
    for exact in (False, True, False):
        torch.use_deterministic_algorithms(exact)
        cudnn_attention.cudnn_attention(q, q, q, False)
    cudnn_attention._built.cache_clear()
    # Built once each.
    assert built == [False, True]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("found", [None, object()])
def test_one_clip_is_not_cudnns_where_bits_must_repeat_and_its_gradient_would_not(monkeypatch, exact, found):
    monkeypatch.setattr(varlen, "cudnn_attention", lambda *_: found)
    torch.use_deterministic_algorithms(exact)
    q, start = torch.zeros(1, HEADS, 5, WIDTH), torch.tensor([0, 5])
    # Private: what follows from it takes a GPU.
    assert varlen._is_single_clip(q, q, q, start) is (not exact or found is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# With a filling; one that is as long as the list; a clip alone; and one that attends to a context.
@pytest.mark.parametrize(
    ("tokens", "length", "keys"),
    [(40, 33, None), (387, 350, None), (387, 387, None), (1300, 64, None), (387, None, None), (387, None, 257)],
)
def test_a_pair_by_cudnn_is_attention_of_the_clip_alone(tokens, length, keys, dtype, monkeypatch):
    pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    own = {"device": "cuda", "dtype": dtype}
    q, grad = torch.randn(tokens, 2, HEADS, WIDTH, **own), torch.randn(tokens, HEADS, WIDTH, **own)
    k, v = (torch.randn(keys or tokens, *of, HEADS, WIDTH, **own) for of in ((2,), ()))
    bounds = [0, tokens] if length is None else [0, length, tokens]
    start = torch.tensor(bounds, device="cuda", dtype=torch.int32)
    key_start = start if keys is None else torch.tensor([0, keys], device="cuda", dtype=torch.int32)

    made, find = [], cudnn_attention.cudnn_attention

    def noted(*given):
        made.append(find(*given))
        return made[-1]

    monkeypatch.setattr(varlen, "cudnn_attention", noted)

    def both_ways(filling):
        given = []
        for value in (q, k, v):
            if length is not None:
                value[length:] = filling
            given.append(value.clone().requires_grad_())
        back = grad.clone()
        if length is not None:
            # Attention does not look at it.
            back[length:] = filling
        out = varlen.varlen_attention(*given, start, key_start)
        return [value[:length] for value in (out, *torch.autograd.grad(out, given, back))]

    found = both_ways(1.0)
    for ours, huge in zip(found, both_ways(1e4), strict=True):
        torch.testing.assert_close(ours, huge, rtol=2e-2, atol=2e-2)
    wide = [value[:length].float().requires_grad_() for value in (q, k, v)]
    heads = [wide[0], wide[1], wide[2][:, None].expand(-1, 2, -1, -1)]
    members = F.scaled_dot_product_attention(*(value.permute(1, 2, 0, 3) for value in heads)).permute(2, 0, 1, 3)
    expected = members[:, 0] - members[:, 1]
    wanted = [expected, *torch.autograd.grad(expected, wide, grad[:length].float())]
    # It is this kernel that was tried, not the one that takes its place.
    assert len(made) == (2 if length is None else 4)
    assert None not in made
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.gpu
# A clip alone, one with a filling, several; so many tokens that what is added in any order would show.
@pytest.mark.parametrize("starts", [(0, 4155), (0, 3700, 4155), (0, 1000, 3100, 4155)])
def test_attention_of_a_deterministic_run_repeats_its_bits(starts, monkeypatch, record_property):
    own, tokens = {"device": "cuda", "dtype": torch.bfloat16}, starts[-1]
    pairs, v, grad = torch.randn(2, tokens, 2, HEADS, WIDTH, **own), *torch.randn(2, tokens, HEADS, WIDTH, **own)
    start, made, find = torch.tensor(starts, device="cuda", dtype=torch.int32), [], cudnn_attention.cudnn_attention
    monkeypatch.setattr(varlen, "cudnn_attention", lambda *given: made.append(find(*given)) or made[-1])
    torch.use_deterministic_algorithms(True)

    def both_ways():
        given = [value.clone().requires_grad_() for value in (*pairs, v)]
        out = varlen.varlen_attention(*given, start, start)
        return [value[: starts[-2] or tokens] for value in (out, *torch.autograd.grad(out, given, grad))]

    first = both_ways()
    for _ in range(5):
        assert all(torch.equal(found, expected) for found, expected in zip(both_ways(), first, strict=True))
    assert all(value.isfinite().all() for value in first)
    record_property("by_cudnns_package", bool(made) and None not in made)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
# One clip, one with a filling, several.
@pytest.mark.parametrize("starts", [(0, 40), (0, 33, 40), (0, 9, 30, 40)])
def test_results_have_the_shapes_and_strides_the_compiler_is_told(starts, device):
    own = {"device": device, "dtype": torch.bfloat16}
    q, k, v, *_, second = torch.randn(40, 6, HEADS, WIDTH, **own).unbind(1)
    # As they come from one projection: parts of a wider tensor.
    pair, start = torch.stack([q, second], 1), torch.tensor(starts, device=device, dtype=torch.int32)
    operations, tests = torch.ops.sa3dist, ("test_schema", "test_faketensor")
    given = pair, torch.stack([k, second], 1), v, start, start
    torch.library.opcheck(operations.varlen_attention, given, test_utils=tests)
    made = operations.varlen_attention(*given)
    grad = torch.randn(HEADS, 40, WIDTH, **own).transpose(0, 1)
    back = grad, *given[:3], *made, *given[3:]
    torch.library.opcheck(operations.varlen_attention_backward, back, test_utils=tests)
    assert all(value.is_contiguous() for value in (*made, *operations.varlen_attention_backward(*back)))
