"""Two runs in one place: the second is refused and touches nothing; what a dead one left behind keeps nobody out."""

import errno
import functools
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from sa3dist import cli, errors, supervise, train
from sa3dist.formats import STATUS_DIR_VARIABLE
from sa3dist.runtime import file_lock, run_lock
from sa3dist.runtime.signals import SIGNALS, StopRequest
from sa3dist.runtime.watchdog import Watchdog
from tests.helpers.forked_trainers import ForkedTrainer
from tests.helpers.ranks import exit_codes, run_ranks

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def _own_handlers():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    run_lock.release_all()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def owner():
    """Starts a process that holds the lock of a directory; its pid. Beats fast, and may be of another machine."""
    started = []

    def start(directory, space=None, clock=0.0):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                run_lock.BEAT_SECONDS = 0.05
                if space is not None:
                    run_lock.process_space = lambda: space
                now = time.time
                time.time = lambda: now() + clock
                run_lock.take(directory)
                os.write(write, b"x")
                time.sleep(120)
            finally:
                os._exit(0)
        started.append(pid)
        assert os.read(read, 1) == b"x"
        return pid

    yield start
    for pid in started:
        end(pid)


def end(pid):
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def tree(directory):
    """Everything that a touch would change, but for the lock, which its owner keeps renewing."""
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes() if path.is_file() else None)
        for path in [directory, *sorted(directory.rglob("*"))]
        if path.name != run_lock.LOCK_NAME
    }


# Who has it.


def try_once(group, directory, at):
    """Take the lock at a common moment; whether this process has it."""
    time.sleep(max(0.0, at - time.time()))
    try:
        run_lock.take(directory)
    except errors.InUse:
        return False
    return True


@pytest.mark.parametrize("left", ["nothing", "a dead lock", "half a lock"])
@pytest.mark.parametrize("lockable", [True, False])
def test_of_many_that_come_at_once_one_has_it(tmp_path, monkeypatch, left, lockable):
    def cannot(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if not lockable:
        monkeypatch.setattr(file_lock.fcntl, "flock", cannot)
    for round_ in range(2 if lockable else 1):
        directory = tmp_path / str(round_)
        directory.mkdir()
        if left == "a dead lock":
            dead = {"token": "x", "beat": 3, "time": time.time(), **run_lock.this_process(), "start": 1}
            (directory / run_lock.LOCK_NAME).write_text(json.dumps(dead))
        elif left == "half a lock":
            (directory / run_lock.LOCK_NAME).write_text('{"token": "x", "be')
        # One process group of several ranks is the quickest way to start several processes.
        has = run_ranks(5, functools.partial(try_once, directory=directory, at=time.time() + 0.4))
        assert sum(has) == 1


def test_a_lock_is_given_back_and_names_its_owner_while_it_is_held(tmp_path):
    token = run_lock.take(tmp_path / "run")
    assert run_lock.peek(tmp_path / "run")["token"] == token
    assert not run_lock.is_anothers(tmp_path / "run")
    run_lock.release(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    # Once more: nothing is left that would keep it.
    with run_lock.held(tmp_path / "run"), pytest.raises(errors.InUse, match=f"by process {os.getpid()} on {HOST};"):
        run_lock.take(tmp_path / "run")


def test_a_killed_owner_keeps_nobody_out_nor_does_a_zombie_or_its_number(tmp_path, owner):
    pid = owner(tmp_path)
    with pytest.raises(errors.InUse, match=f"by process {pid} on {HOST};"):
        run_lock.take(tmp_path)
    os.kill(pid, signal.SIGKILL)
    # Not waited for: a zombie.
    deadline = time.monotonic() + 10
    while run_lock.lives(run_lock.peek(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run_lock.take(tmp_path)
    run_lock.release(tmp_path)
    # The same number, given to a process of another time.
    (tmp_path / run_lock.LOCK_NAME).write_text(
        json.dumps({"token": "x", "beat": 0, "time": time.time(), **run_lock.this_process(), "start": 12})
    )
    assert run_lock.take(tmp_path)


# Of another machine.


@pytest.fixture
def short_times(monkeypatch):
    monkeypatch.setattr(run_lock, "DEAD_SECONDS", 2.0)
    monkeypatch.setattr(run_lock, "DOUBT_SECONDS", 0.6)
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 0.05)


@pytest.mark.usefixtures("short_times")
@pytest.mark.parametrize("clock", [0.0, -3600.0, 3600.0])
def test_a_run_that_lives_on_another_machine_is_seen_to_live_whatever_its_clock_says(tmp_path, owner, clock):
    pid = owner(tmp_path, space=["another boot", "pid:[1]"], clock=clock)
    with pytest.raises(errors.InUse, match=f"by process {pid} "):
        run_lock.take(tmp_path)


@pytest.mark.usefixtures("short_times")
def test_a_requeued_job_waits_until_the_killed_run_of_another_machine_is_dead_and_says_so_once(tmp_path, owner, caplog):
    caplog.set_level("INFO", logger="sa3dist")
    end(owner(tmp_path, space=["another boot", "pid:[1]"]))
    assert run_lock.is_anothers(tmp_path)
    begin = time.monotonic()
    assert run_lock.take(tmp_path)
    assert time.monotonic() - begin >= run_lock.DEAD_SECONDS
    assert caplog.text.count("watching for") == 1


@pytest.mark.usefixtures("short_times")
def test_one_that_was_killed_long_ago_is_watched_for_a_moment_only(tmp_path, owner, monkeypatch):
    monkeypatch.setattr(run_lock, "DEAD_SECONDS", 120.0)
    end(owner(tmp_path, space=["another boot", "pid:[1]"], clock=-3600.0))
    assert not run_lock.is_anothers(tmp_path)
    begin = time.monotonic()
    assert run_lock.take(tmp_path)
    assert run_lock.DOUBT_SECONDS <= time.monotonic() - begin < run_lock.DEAD_SECONDS


@pytest.mark.usefixtures("short_times")
def test_a_stop_request_ends_the_wait(tmp_path, owner):
    end(owner(tmp_path, space=["another boot", "pid:[1]"]))
    stop = StopRequest()
    stop.signal_name = "SIGTERM"
    with pytest.raises(errors.Interrupted, match="SIGTERM while waiting for output_dir"):
        run_lock.take(tmp_path, lambda: stop.raise_if_requested("waiting for output_dir"))


def test_a_run_that_was_given_up_for_dead_and_is_continued_ends_and_touches_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    theirs = {"token": "theirs", "beat": 0, "time": time.time(), **run_lock.this_process(), "pid": os.getppid()}
    theirs["start"] = run_lock.start_ticks(os.getppid())

    def work(group):
        run_lock.take(tmp_path)
        with Watchdog(StopRequest(), tmp_path).watch(group):
            (tmp_path / run_lock.LOCK_NAME).write_text(json.dumps(theirs))
            time.sleep(60)

    assert exit_codes(1, work) == [errors.EXIT_ENVIRONMENT]
    assert f"process {os.getppid()} on {HOST} has taken over" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.LOCK_NAME]
    assert json.loads((tmp_path / run_lock.LOCK_NAME).read_text()) == theirs


def test_a_directory_that_takes_no_files_needs_no_lock():
    assert run_lock.take(Path("/sys/kernel/sa3dist-run")) is None


# Programs.


@pytest.fixture
def words(demo_base, demo_clips, demo_work):
    settings = {"model": demo_base, "work_dir": demo_work, "number_of_steps": 2, "rank": 2, "duration": 1}
    settings |= {"audio_data_url": demo_clips, "base_precision": "fp32", "mixed_precision": "no", "num_workers": 0}
    settings |= {"report": "false", "gradient_checkpointing": "off"}
    return [f"{key}={value}" for key, value in settings.items()] + ["log_every=1"]


@pytest.mark.parametrize("command", ["train", "shard", "encode", "loop", "export", "unreadable settings"])
def test_every_command_is_refused_where_a_run_writes_and_touches_nothing(words, tmp_path, owner, capfd, command):
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("status.json", "metrics.jsonl"):
        (directory / name).write_text("{}")
    pid, before = owner(directory), tree(directory)
    more = ["rnak=3"] if command == "unreadable settings" else []
    name = "train" if more else command
    assert cli.main([name, *words, f"output_dir={directory}", *more]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "sa3dist: " not in line]
    assert line.startswith("rnak: ") if more else f"in use by process {pid} on {HOST};" in line
    assert tree(directory) == before
    assert run_lock.peek(directory)["pid"] == pid


def test_the_second_of_two_runs_is_refused_and_goes_on_when_the_first_is_killed(words, tmp_path, capfd):
    directory = tmp_path / "run"
    more = [f"output_dir={directory}", "number_of_steps=9000", "save_every=2"]
    with ForkedTrainer([*words, *more], tmp_path / "said") as first:
        deadline = time.monotonic() + 120
        while not list(directory.glob("checkpoints/step-*")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # It trains on: only what it does not write may be compared.
        os.kill(first.pid, signal.SIGSTOP)
        before = tree(directory)
        assert train.main([*words, f"output_dir={directory}"]) == 2
        assert tree(directory) == before
        assert f"in use by process {first.pid} on {HOST};" in capfd.readouterr().err
    assert (directory / run_lock.LOCK_NAME).exists()
    steps = len((directory / "metrics.jsonl").read_text().splitlines()) + 3
    assert train.main([*words, f"output_dir={directory}", f"number_of_steps={steps}"]) == 0
    logged = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, steps + 1))
    assert not (directory / run_lock.LOCK_NAME).exists()
    # The files of a run that is being continued are not overwritten from its checkpoint meanwhile.
    with run_lock.held(directory):
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        assert cli.main(["export", str(directory)]) == 2
        assert "with --output" in capfd.readouterr().err
        assert cli.main(["export", str(directory), "--output", str(tmp_path / "elsewhere")]) == 0


def test_all_ranks_are_refused_and_a_supervisor_is_told_elsewhere(tmp_path, owner, monkeypatch, capfd):
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    owner(directory)
    monkeypatch.setenv(STATUS_DIR_VARIABLE, str(elsewhere))

    def work(group):
        from sa3dist.runtime.exit_status import run_program
        from sa3dist.runtime.peers import leave

        def body():
            with Watchdog(StopRequest(), directory).watch(group) as watchdog:
                try:
                    train.take_output_dir(group, directory, StopRequest(), watchdog)
                except errors.InUse as failure:
                    raise leave(group, failure, watchdog.told) from None

        os._exit(run_program(body, lambda: directory, lambda: 0))

    assert exit_codes(3, work) == [2, 2, 2]
    assert capfd.readouterr().err.count("in use by process") == 1
    assert json.loads((elsewhere / "status.json").read_text())["exit_code"] == 2
    assert [path.name for path in directory.iterdir()] == [run_lock.LOCK_NAME]


def test_a_supervisor_starts_nothing_where_a_run_writes(tmp_path, owner, capfd):
    pid = owner(tmp_path)
    start = [sys.executable, "-c", "import pathlib; pathlib.Path('started').touch()", "sa3dist.train"]
    assert supervise.main([*start, f"output_dir={tmp_path}"]) == 2
    assert f"in use by process {pid} on {HOST};" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.LOCK_NAME]


def test_a_supervisor_believes_the_status_of_a_run_that_may_not_write_beside_its_results(tmp_path):
    agent = f"""
import os, pathlib, sys
pathlib.Path(os.environ["{STATUS_DIR_VARIABLE}"], "status.json").write_text('{{"exit_code": 2}}')
sys.exit(1)
"""
    assert supervise.main([sys.executable, "-c", agent, "sa3dist.train", f"output_dir={tmp_path}"]) == 2
    assert list(tmp_path.iterdir()) == []
