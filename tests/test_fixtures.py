"""What tests leave set in their process reaches no fixture of a later one, whatever the fixture's scope."""

import pytest
import torch

from tests.helpers.golden import THREADS


@pytest.fixture(scope="module")
def found():
    """Threads and determinism before the fixtures of one test are set up."""
    return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def test_a_test_may_leave_another_number_of_threads_and_determinism():
    torch.set_num_threads(THREADS + 1)
    torch.use_deterministic_algorithms(True)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (THREADS + 1, True)


def test_the_fixtures_of_a_module_after_it_find_neither(found):
    assert found == (THREADS, False)
