"""A process asked to stop during preparation leaves in time even when its main thread never looks."""

import json
import signal
import subprocess
import sys
import time

import pytest

# The main thread sleeps in C, again and again, and opens files: it runs handlers but never polls, as an import does.
PROGRAM = """
import ctypes, subprocess, sys
from pathlib import Path
from sa3dist.parallel import departure
from sa3dist.parallel.signals import StopRequest

directory = Path(sys.argv[1])
departure.LEAVE_SECONDS = 0.3
stop = StopRequest().install()
departure.leave_in_time(stop, directory)
stop.holds_state = len(sys.argv) > 2
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


def test_a_signal_ends_a_process_that_never_looks_and_its_children(start, tmp_path):
    process = start()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 75)
    assert status["message"].startswith("SIGTERM during preparation")
    assert not lives(int((tmp_path / "child").read_text()))


def test_a_process_that_holds_unsaved_state_is_left_to_save_it(start, tmp_path):
    process = start("training")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    assert not (tmp_path / "status.json").exists()


def test_later_signals_write_nothing_into_files_opened_since(start, tmp_path):
    process = start("training")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    files = list(tmp_path.glob("file-*"))
    assert process.poll() is None
    assert len(files) > 3
    assert [file.stat().st_size for file in files] == [0] * len(files)


def test_without_a_signal_nothing_ends(start):
    process = start()
    time.sleep(0.8)
    assert process.poll() is None
