"""A process asked to stop during preparation leaves in time even when its main thread never looks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from sa3dist import errors
from sa3dist.runtime.peers import leave
from sa3dist.runtime.process_group import run_on_all_ranks
from sa3dist.runtime.signals import StopRequest
from sa3dist.runtime.watchdog import Watchdog
from tests.helpers.ranks import exit_codes

# The main thread sleeps in C, again and again, and opens files: it runs handlers but never polls, as an import does.
PROGRAM = """
import ctypes, subprocess, sys
from pathlib import Path
import torch
from sa3dist.runtime import watchdog
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest

directory = Path(sys.argv[1])
watchdog.LEAVE_SECONDS = 0.3
dog = watchdog.Watchdog(StopRequest().install(), directory).__enter__()
if len(sys.argv) > 2:
    group = Group(0, 1, torch.device("cpu"))
    group.liveness.enter("train")
    dog.watch(group)
child = subprocess.Popen(["sleep", "60"])
(directory / "child").write_text(str(child.pid))
(directory / "ready").touch()
files = []
while True:
    ctypes.CDLL(None).usleep(200_000)
    files.append(open(directory / f"file-{len(files)}", "wb"))
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def start(*words):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), *words])
        started.append(process)
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for child in tmp_path.glob("child"):
        subprocess.run(["kill", "-9", child.read_text()], stderr=subprocess.DEVNULL)


def lives(pid) -> bool:
    # Orphans of a container may stay as zombies: nobody waits for them.
    done = subprocess.run(["ps", "--no-headers", "-o", "stat", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def test_a_signal_and_nothing_else_ends_a_process_that_never_looks_and_its_children(start, tmp_path):
    process = start()
    time.sleep(0.8)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 75)
    assert status["message"].startswith("SIGTERM during preparation")
    assert not lives(int((tmp_path / "child").read_text()))


def test_a_process_that_holds_unsaved_state_is_left_to_save_it_and_later_signals_write_nothing_into_its_files(
    start, tmp_path
):
    process = start("training")

    def opened(more):
        before, deadline = len(list(tmp_path.glob("file-*"))), time.monotonic() + 60
        while len(list(tmp_path.glob("file-*"))) < before + more:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    assert not (tmp_path / "status.json").exists()
    opened(3)
    process.send_signal(signal.SIGTERM)
    opened(2)
    files = list(tmp_path.glob("file-*"))
    assert process.poll() is None
    assert [file.stat().st_size for file in files] == [0] * len(files)


def test_a_crash_beneath_python_says_where_it_was():
    code = "import ctypes; from sa3dist import train; train.as_process(lambda: ctypes.string_at(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert "string_at" in done.stderr


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_never_looks_tells_its_peer_that_it_was_stopped(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr("sa3dist.runtime.watchdog.LEAVE_SECONDS", 0.3)
    monkeypatch.setattr("sa3dist.runtime.watchdog.REPORT_SECONDS", 0.3)
    monkeypatch.setattr("sa3dist.runtime.peers.HEARTBEAT_SECONDS", 0.1)

    def work(group):
        stop = StopRequest().install()
        with Watchdog(stop, tmp_path).watch(group) as watchdog:
            group.liveness.enter("encode")
            dist.barrier()
            if group.dist_rank == stopped:
                os.kill(os.getpid(), signal.SIGTERM)
                while True:
                    time.sleep(1)
            try:
                run_on_all_ranks(group, "encoded", lambda: None, stop)
            except Exception as failure:
                reason = leave(group, failure, watchdog.told)
                os._exit(reason.exit_code if reason.origin == (stopped, socket.gethostname()) else 1)

    assert exit_codes(2, work) == [75, 75]


def test_a_rank_in_the_middle_of_its_share_ends_in_order_when_another_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("sa3dist.runtime.peers.HEARTBEAT_SECONDS", 0.1)

    def work(group):
        stop = StopRequest()

        def share():
            if group.dist_rank == 1:
                raise errors.DataError("clip 3: damaged")
            try:
                while True:
                    stop.raise_if_requested("encoding")
                    time.sleep(0.01)
            finally:
                (tmp_path / "cleaned up").touch()

        with Watchdog(stop, tmp_path).watch(group) as watchdog:
            group.liveness.enter("encode")
            try:
                run_on_all_ranks(group, "encode", share, stop)
            except errors.SA3DistError as failure:
                reason = leave(group, failure, watchdog.told)
                os._exit(reason.exit_code if str(reason) == "clip 3: damaged" else 1)

    assert exit_codes(2, work) == [2, 2]
    assert (tmp_path / "cleaned up").exists()
