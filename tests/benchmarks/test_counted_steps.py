"""Launches of a step with more types of adapters and at both lengths, each of which takes a compilation."""

import pytest

pytest.importorskip("triton")
from sa3dist_kernels import triton_support  # noqa: E402

from tests.helpers.counted_steps import assert_within_limits  # noqa: E402


@pytest.mark.skipif(not triton_support.interpreting(), reason="Triton was imported without its interpreter")
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lengths"), [("bora", 2), ("dora-cols-xs", 1)])
def test_a_step_launches_five_kernels_a_layer_and_a_hundred_more_than_the_frozen_model_at_most(kind, lengths):
    import count_launches

    bares, _ = assert_within_limits(kind, count_launches.FRAMES[:lengths])
    assert len(bares) == lengths
