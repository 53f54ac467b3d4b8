"""What Inductor makes of a block for an H100, without one: in a deterministic run nothing is left to be measured."""

import copy

import pytest

pytest.importorskip("triton")
from sa3dist_kernels import triton_support  # noqa: E402

pytestmark = pytest.mark.skipif(not triton_support.interpreting(), reason="Triton was imported without its interpreter")
TOKENS = 4155


@pytest.fixture(scope="module")
def plan_block():
    """The program. It imports the compiler, which takes seconds, and every process of the suite reads this file."""
    import plan_block

    return plan_block


@pytest.mark.slow
def test_kernels_of_a_deterministic_run_have_one_variant_and_are_the_same_whichever_length_comes_first(plan_block):
    made = []
    for frames in (100, 700):
        graphs = plan_block.traced("ours", "dora-rows", frames, TOKENS, shape="tiny-medium")
        assert [is_backward for _, is_backward in graphs] == [False, True]
        forward = copy.deepcopy(graphs[0])
        made.append([kernel for graph in graphs for kernel in plan_block.generated(*graph, exact=True)])
    first, second = made
    assert first == second
    assert len(first) > 10
    assert {len(kernel.variants) for kernel in first} == {1}
    # A run that may round as it likes measures: what is looked for here can be found.
    assert max(len(kernel.variants) for kernel in plan_block.generated(*forward, exact=False)) > 1
