"""Processes of jobs are found by their mark and ended, stopped ones too; a lock goes with its last holder."""

import os
import signal
import subprocess
import threading
import time

import pytest

from sa3dist.serve.processes import MARK, Mark, end_marked, locks_folder, marked, take_lock

STORE = "/store"


@pytest.fixture
def start(tmp_path):
    """Starts a process of a job that sleeps."""
    started = []

    def run(job: str, fence: int, devices=(), store=STORE, **words) -> subprocess.Popen:
        mark = Mark(str(tmp_path), store, job, fence, devices)
        environment = os.environ | mark.environment()
        started.append(subprocess.Popen(["sleep", "60"], env=environment, start_new_session=True, **words))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_the_processes_of_older_attempts_are_ended_and_no_others(start, tmp_path):
    mine = Mark(str(tmp_path), STORE, "job", 3, ())
    old, stopped = start("job", 1), start("job", 2)
    os.kill(stopped.pid, signal.SIGSTOP)
    others = [start("job", 3), start("other", 1), start("job", 1, store="/elsewhere")]
    # Their environment is the one of ``sleep`` once that has begun.
    deadline = time.monotonic() + 30
    while len(marked(mine.is_of)) < 4:
        assert time.monotonic() < deadline
    end_marked(lambda mark: mark.is_of(mine) and mark.job == mine.job and mark.fence < mine.fence)
    assert [process.wait(30) for process in (old, stopped)] == [-signal.SIGKILL] * 2
    assert [process.poll() for process in others] == [None] * 3


@pytest.mark.parametrize("text", ["", "x", "[]", '{"job": 1}', "1"])
def test_what_others_have_set_the_variable_to_is_no_mark(text):
    with subprocess.Popen(["sleep", "60"], env={MARK: text, "PATH": os.environ["PATH"]}) as process:
        assert process.pid not in [found.pid for found in marked(lambda mark: True)]
        process.kill()


def test_a_lock_is_free_when_the_last_process_that_was_given_it_is_gone(start, tmp_path):
    def fail() -> None:
        raise TimeoutError

    handle = take_lock(tmp_path / "gpu-0", fail, fail)
    holder = start("job", 1, (0,), pass_fds=[handle])
    # Its runner is gone.
    os.close(handle)
    with pytest.raises(TimeoutError):
        take_lock(tmp_path / "gpu-0", fail, fail)
    threading.Timer(0.3, holder.kill).start()
    os.close(take_lock(tmp_path / "gpu-0", lambda: None, lambda: None))
    assert holder.wait() == -signal.SIGKILL


def test_who_holds_a_lock_for_too_long_is_ended(start, tmp_path):
    handle = take_lock(tmp_path / "job-1", lambda: None, lambda: None)
    holder = start("job", 1, pass_fds=[handle])
    os.kill(holder.pid, signal.SIGSTOP)
    os.close(handle)
    os.close(take_lock(tmp_path / "job-1", lambda: end_marked(lambda mark: mark.locks == str(tmp_path)), lambda: None))
    assert holder.wait() == -signal.SIGKILL


def test_locks_lie_in_a_folder_of_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = locks_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert locks_folder() == folder
