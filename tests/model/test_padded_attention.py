"""Attention of clips in one list: by cuDNN with a filling, against float32; what the compiler is told of results."""

import pytest
import torch
import torch.nn.functional as F

from sa3dist.model import padded_attention
from sa3dist.model import varlen_attention as varlen

HEADS, WIDTH = 3, 64


def test_where_cudnn_has_no_such_kernel_there_is_none_and_the_log_says_why_once(caplog):
    caplog.set_level("INFO")
    padded_attention._built.cache_clear()
    padded_attention._say.cache_clear()
    for tokens in (5, 6):
        q = torch.zeros(1, HEADS, tokens, WIDTH, dtype=torch.bfloat16)
        assert padded_attention.padded_attention(q, q, q) is None
    (said,) = caplog.messages
    assert said.startswith("clips that do not fill their list of tokens take flash attention")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "length"), [(40, 33), (387, 350), (387, 387), (1300, 64)])
def test_a_pair_with_a_filling_is_attention_of_the_clip_alone(tokens, length, dtype, monkeypatch):
    pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    own = {"device": "cuda", "dtype": dtype}
    q, k, grad = (torch.randn(tokens, 2, HEADS, WIDTH, **own) for _ in range(3))
    v = torch.randn(tokens, HEADS, WIDTH, **own)
    grad[length:] = 0
    start = torch.tensor([0, length, tokens], device="cuda", dtype=torch.int32)

    made, find = [], padded_attention.padded_attention

    def noted(*given):
        made.append(find(*given))
        return made[-1]

    monkeypatch.setattr(varlen, "padded_attention", noted)

    def both_ways(filling):
        given = []
        for value in (q, k, v):
            value[length:] = filling
            given.append(value.clone().requires_grad_())
        out = varlen.varlen_attention(*given, start, start)
        return [value[:length] for value in (out, *torch.autograd.grad(out, given, grad))]

    found = both_ways(1.0)
    for ours, huge in zip(found, both_ways(1e4), strict=True):
        torch.testing.assert_close(ours, huge, rtol=2e-2, atol=2e-2)
    wide = [value[:length].float().requires_grad_() for value in (q, k, v)]
    heads = [wide[0], wide[1], wide[2][:, None].expand(-1, 2, -1, -1)]
    expected = F.scaled_dot_product_attention(*(value.permute(1, 2, 0, 3) for value in heads)).permute(2, 0, 1, 3)
    wanted = [expected, *torch.autograd.grad(expected, wide, grad[:length].float())]
    # It is this kernel that was tried, not the one that takes its place.
    assert len(made) == 4
    assert None not in made
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()


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
    grad = torch.randn(40, HEADS, 2, WIDTH, **own).transpose(1, 2)
    back = grad, *given[:3], *made, *given[3:]
    torch.library.opcheck(operations.varlen_attention_backward, back, test_utils=tests)
    assert all(value.is_contiguous() for value in (*made, *operations.varlen_attention_backward(*back)))
