"""What is still at work when a training ends: waited for together."""

import pytest

from sa3dist.training import observers
from sa3dist.training.observers import close_together


class Part:
    def __init__(self, calls):
        self._calls = calls

    def finish(self, early):
        self._calls.append(("finish", early))

    def close(self, until):
        self._calls.append(("close", until))


@pytest.mark.parametrize(("early", "step_timeout", "seconds"), [(False, 600, 10), (True, 600, 2), (False, 3, 1.5)])
def test_all_are_told_before_any_is_waited_for_and_have_one_deadline(early, step_timeout, seconds, monkeypatch):
    monkeypatch.setattr(observers.time, "monotonic", lambda: 1000.0)
    calls = []
    close_together([Part(calls), Part(calls)], early, step_timeout)
    assert calls == [("finish", early)] * 2 + [("close", 1000.0 + seconds)] * 2
