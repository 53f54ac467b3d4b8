"""Launches of a step, counted without a device: the counter itself, and its limits for every adapter type."""

import json

import pytest
import torch

pytest.importorskip("triton")
import check_step  # noqa: E402
from sa3dist_kernels import ADAPTER_TYPES, triton_support  # noqa: E402
from sa3dist_kernels.raw_sums import LayerPass, raw_sums  # noqa: E402

from tests.helpers import counted_steps  # noqa: E402
from tests.helpers.counted_steps import stored  # noqa: E402
from tests.helpers.golden import ROOT  # noqa: E402

interpreted = pytest.mark.skipif(
    not triton_support.interpreting(), reason="Triton was imported without its interpreter"
)
H100 = ROOT / "kernels/benchmarks/results/gpu_step.json"


@pytest.fixture(scope="module")
def counts():
    """The program. It imports the compiler, which takes seconds, and every process of the suite reads this file."""
    import count_launches

    return count_launches


def test_an_operation_counts_once_and_a_view_or_empty_memory_does_not(counts):
    x = torch.ones(4, 6)
    found = counts.LaunchCounter().of(lambda: (x.view(6, 4).t() + torch.empty(4, 6)).split(2))
    assert found == {"torch": 1}


def test_a_compiled_function_counts_its_fused_kernels_and_its_products_each_way(counts):
    counter = counts.LaunchCounter()
    torch._dynamo.reset()
    function = torch.compile(lambda x, w: torch.exp((x.sin() + 1) @ w), backend=counter.backend)
    x, w = torch.ones(8, 8), torch.ones(8, 8, requires_grad=True)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        function(x, w).sum().backward()
    found, expected = counter.counts, (x.sin() + 1).t() @ torch.exp((x.sin() + 1) @ w)
    # sin and 1, product, exp; the gradient of exp, the product with what the first kernel made.
    assert (found["forward"], found["backward"]) == (3, 2)
    torch.testing.assert_close(w.grad, expected)
    torch._dynamo.reset()


@interpreted
@pytest.mark.parametrize(
    ("kind", "tokens", "kernels", "additions"),
    [("lora", 500, 2, 0), ("bora", 1024, 2, 1), ("lora-xs", 32, 2, 0), ("bora-xs", 500, 3, 1)],
)
def test_launches_of_thin_sums_are_counted_and_not_run(counts, kind, tokens, kernels, additions):
    x, dy, left, right = (torch.ones(shape) for shape in ((tokens, 32), (tokens, 48), (48, 4), (4, 32)))
    counter = counts.LaunchCounter()
    with counter.noting_triton():
        found = counter.of(lambda: raw_sums([LayerPass(x, x, dy, dy, left, right)], ADAPTER_TYPES[kind]))
    assert (found["triton"], found["torch"]) == (kernels, additions)


# Two compilations. The stored counts, which these are held to, have all nine types and both lengths; another type, and
# the other length: test_counted_steps.py.
@interpreted
@pytest.mark.slow
def test_a_step_launches_five_kernels_a_layer_and_a_hundred_more_than_the_frozen_model_at_most(counts):
    (bare,), (row,) = counted_steps.assert_within_limits("bora", counts.FRAMES[:1])
    assert bare["frames"] == row["frames"] == counts.FRAMES[0]


def test_the_stored_counts_of_the_whole_model_keep_the_limits(counts):
    for frames in counts.FRAMES:
        bare = stored("frozen", frames)
        assert bare["depth"] == counts.DEPTH
        for kind in ADAPTER_TYPES:
            row = stored(kind, frames)
            assert row["total"] <= row["most"] == counts.most(bare, row)


def test_the_stored_counts_are_at_most_a_tenth_above_what_an_h100_was_seen_to_run():
    # It ran an earlier state, in which every layer's raw sums had launches of their own.
    seen = 0
    for row in json.loads(H100.read_text())["rows"]:
        for name, profile in ((row["adapter_type"], "profile"), ("frozen", "frozen_profile")):
            if profile in row and row["compiled"]:
                counted = check_step.counted_kernels(row["shape"], name, row["frames"])
                assert counted <= 1.1 * row[profile]["kernels_per_step"]
                seen += 1
    assert seen
