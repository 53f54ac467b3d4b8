"""A run ends itself, with its group, when the lease it was started under is over."""

import os
import signal
import threading
import time

import pytest

from sa3dist.runtime import lease
from sa3dist.runtime.run_lock import start_ticks


@pytest.fixture
def in_a_child(tmp_path, monkeypatch):
    """Runs work in a forked process that leads a group of its own; its exit code."""
    monkeypatch.setenv(lease.VARIABLE, str(tmp_path / "lease"))

    def run(work) -> int:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            work()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    run.file = tmp_path / "lease"
    return run


def test_a_run_outlives_its_deadline_as_long_as_that_is_moved(in_a_child):
    lease.write(in_a_child.file, lease.seconds_now() + 1)

    def work():
        lease.watch()
        for _ in range(4):
            time.sleep(0.4)
            lease.write(in_a_child.file, lease.seconds_now() + 1)

    assert in_a_child(work) == 0


def test_a_run_whose_deadline_stands_still_is_killed_with_what_it_started(in_a_child, tmp_path):
    lease.write(in_a_child.file, lease.seconds_now() + 0.5)

    def work():
        child = os.fork()
        if child == 0:
            time.sleep(60)
        (tmp_path / "child").write_text(str(child))
        lease.watch()
        time.sleep(60)

    assert in_a_child(work) == -signal.SIGKILL
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 30
    while start_ticks(child) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lease_that_cannot_be_read_holds_as_it_last_was_and_one_that_never_was_is_over(in_a_child):
    lease.write(in_a_child.file, lease.seconds_now() + 60)

    def work():
        lease.end_if_over()
        in_a_child.file.unlink()
        lease.end_if_over()

    assert in_a_child(work) == 0
    assert in_a_child(lease.end_if_over) == -signal.SIGKILL


def test_nothing_is_published_behind_the_deadline(in_a_child, tmp_path):
    from sa3dist.training.checkpoint import Checkpoint, list_all, save

    lease.write(in_a_child.file, lease.seconds_now() - 1)
    assert in_a_child(lambda: save(tmp_path / "run", Checkpoint({}, {}, {"step": 1}), 2)) == -signal.SIGKILL
    assert list_all(tmp_path / "run") == []


def test_a_run_without_a_lease_is_left_alone(monkeypatch):
    monkeypatch.delenv(lease.VARIABLE, raising=False)
    lease.watch()
    assert "lease" not in {thread.name for thread in threading.enumerate()}
    lease.end_if_over()
