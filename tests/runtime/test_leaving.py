"""Asked to leave, a run saves and leaves in time: when its terminal closes, and whatever its loader does."""

import contextlib
import errno
import json
import multiprocessing
import os
import pty
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sa3dist import errors, loop
from sa3dist.data.batches.loader import (
    explaining_full_shared_memory,
    killing_loaders_when_interrupted,
    leave_signals_to_the_main_process,
    share,
)
from sa3dist.runtime import peers, watchdog
from sa3dist.runtime.exit_status import translate
from sa3dist.runtime.own_process import DetachableStream
from sa3dist.runtime.signals import StopRequest
from sa3dist.runtime.watchdog import Watchdog
from sa3dist.training import checkpoint
from tests.helpers.forked_trainers import ForkedTrainer
from tests.helpers.program import ENVIRONMENT
from tests.helpers.ranks import exit_codes, run_ranks
from tests.helpers.trainers import make_settings, make_trainer

STEPS = 3


@pytest.fixture
def words(demo_base, demo_clips, demo_work, tmp_path):
    settings = {"model": demo_base, "work_dir": demo_work, "output_dir": tmp_path / "run", "number_of_steps": 9000}
    settings |= {"audio_data_url": demo_clips, "base_precision": "fp32", "mixed_precision": "no", "num_workers": 4}
    settings |= {"report": "false", "gradient_checkpointing": "off"}
    settings |= {"rank": 2, "duration": 1, "log_every": 1, "save_every": 9000}
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture
def command(words):
    return [sys.executable, "-m", "sa3dist.train", *words]


def rows(output_dir):
    path = output_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_until(true, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_saved_all(output_dir):
    status = json.loads((output_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 75)
    assert checkpoint.find(output_dir, "auto").step == status["step"] == rows(output_dir)


# The terminal.


def test_a_run_whose_terminal_closes_saves_although_nobody_reads_what_it_says(command, tmp_path):
    ours, theirs = pty.openpty()

    def in_a_terminal():
        # Whoever runs the tests under nohup has handed on that a closed terminal is to be passed over.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.setsid()
        os.close(os.open(os.ttyname(theirs), os.O_RDWR))

    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=in_a_terminal
    )
    os.close(theirs)
    try:
        # A progress bar fills the terminal, whose reader must not fall behind.
        os.set_blocking(ours, False)

        def trains():
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 1 << 16)
            return rows(tmp_path / "run") >= STEPS

        wait_until(trains, process)
    finally:
        os.close(ours)
    try:
        assert process.wait(30) == 75
    finally:
        process.kill()
    assert_saved_all(tmp_path / "run")


def test_under_nohup_a_closed_terminal_changes_nothing_and_a_stopped_loader_keeps_no_run_from_saving(words, tmp_path):
    with ForkedTrainer(words, tmp_path / "said", ignored=(signal.SIGHUP,)) as process:
        wait_until(lambda: rows(tmp_path / "run") >= STEPS, process)
        before = rows(tmp_path / "run")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: rows(tmp_path / "run") > before + STEPS, process)
        loaders = psutil.Process(process.pid).children()
        assert len(loaders) == 4
        for loader in loaders:
            loader.suspend()
        # What they had ready is used up.
        time.sleep(1.5)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
        # Within what launch agents leave; loader processes would be waited for in turn, for 5 s each.
        assert time.monotonic() - asked < 15
        assert_saved_all(tmp_path / "run")
        assert not [loader for loader in loaders if loader.is_running() and loader.status() != psutil.STATUS_ZOMBIE]


def test_programs_outlive_the_reader_of_what_they_print():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "sa3dist.cli", "--help"], env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE
    )
    assert (done.returncode, done.stderr) == (0, b"")
    os.close(write)
    # Only that: a full disk is no reader that has gone.
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    with pytest.raises(OSError, match="No space"):
        print("x", file=DetachableStream(full), flush=True)
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("--help >/dev/full", 70, "<stdout>: cannot write (No space left on device)"),
        ("--help >&- 2>&-", 0, ""),
        # Neither stream says it; the code does.
        ("train rank=x 2>&-", 2, ""),
        ("train rank=x 2>/dev/full", 2, ""),
    ],
)
def test_a_program_ends_with_its_own_code_where_nothing_can_be_printed(redirected, code, said, tmp_path):
    words = f"exec {shlex.quote(sys.executable)} -m sa3dist.cli {redirected}"
    done = subprocess.run(
        ["sh", "-c", words], env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (code, said)
    if code == 2:
        assert json.loads((tmp_path / "runs/sa3dist-lora/status.json").read_text())["exit_code"] == 2


def test_a_folder_that_is_gone_is_named_before_a_library_ends_the_process_for_it(tmp_path):
    words = f"mkdir gone && cd gone && rmdir ../gone && exec {shlex.quote(sys.executable)} -m sa3dist.cli train rank=4"
    done = subprocess.run(["sh", "-c", words], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 70
    assert done.stderr == "the working directory is gone (No such file or directory); cd to one that exists\n"


# The loader.


@pytest.fixture
def short_times(monkeypatch):
    monkeypatch.setattr(watchdog, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "BREAK_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "LEAVE_SECONDS", 1.0)
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(peers, "HEARTBEAT_SECONDS", 0.1)


def good_until(step, batch):
    """A stream that hangs in the place of a step, in a read that signals interrupt."""
    yield from [batch] * (step - 1)
    os.read(os.pipe()[0], 1)


def train_until_asked(group, output_dir, hangs, asked, blocked=()):
    """Where the run ended, when rank ``hangs`` gets nothing for step 4 and rank ``asked`` is then sent SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    stop = StopRequest().install()
    trainer, batch = make_trainer(group, 10**6, make_settings(save_every=10**6))
    stream = good_until(4, batch) if group.dist_rank == hangs else iter([batch] * 10**6)
    with Watchdog(stop, output_dir).watch(group) as dog:
        group.liveness.enter("train", 600)
        if group.dist_rank == asked:
            signal_when(lambda: trainer.step == 3, signal.SIGTERM)
        with contextlib.closing(trainer.saver):
            try:
                loop.train(trainer, stream, stop, output_dir, None)
            except Exception as failure:
                reason = peers.leave(group, failure, dog.told)
                return trainer.step, reason.exit_code, str(reason)


def signal_when(true, number):
    """Signal this process, from another thread, half a second after something has become true."""

    def watch():
        while not true():
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.usefixtures("short_times")
@pytest.mark.parametrize(("ranks", "hangs", "asked"), [(1, 0, 0), (2, 1, 0), (2, 0, 1), (2, 1, 1)])
def test_a_loader_that_hangs_keeps_no_rank_from_saving_whichever_was_asked(tmp_path, ranks, hangs, asked):
    ended = run_ranks(ranks, lambda group: train_until_asked(group, tmp_path, hangs, asked))
    assert [(step, code) for step, code, _ in ended] == [(3, 75)] * ranks
    assert all("SIGTERM" in message and "while waiting for data" in message for *_, message in ended)
    assert checkpoint.find(tmp_path, "auto").step == 3


@pytest.mark.usefixtures("short_times")
@pytest.mark.parametrize("hangs", [0, 1])
def test_ranks_leave_in_time_beside_a_read_that_no_signal_interrupts(tmp_path, capfd, hangs):
    def work(group):
        # What ends by itself is the rank that does not hang: it hears of the other's end.
        _, code, _ = train_until_asked(group, tmp_path, hangs, 0, blocked={signal.SIGALRM})
        os._exit(code)

    assert exit_codes(2, work) == [75, 75]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["exit_code"], status["dist_rank"]) == (75, hangs)
    assert "while waiting for data, which hangs" in status["message"]


def test_nothing_but_the_wait_for_data_is_broken_off():
    stop = StopRequest().install()
    stop.signal_name = "SIGTERM"
    stop.break_off()
    time.sleep(0.05)

    def wait():
        with stop.breakable():
            stop.break_off()
            time.sleep(5)

    with pytest.raises(errors.Interrupted, match="SIGTERM while waiting for data"):
        wait()
    assert not stop.waiting


# Shared memory.


class Clips(Dataset):
    """As much as a micro batch of long clips, handed over as the loader's processes do."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        clip = torch.full((1 << 20,), float(index))
        try:
            share([clip])
        except errors.SA3DistError as problem:
            return problem
        return clip


def without_room(worker):
    leave_signals_to_the_main_process(worker)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def without_handles(worker):
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    for _ in range(16):
        with contextlib.suppress(OSError):
            os.dup(0)


@pytest.mark.parametrize(
    ("limit", "expected"), [(without_room, "/dev/shm .*num_workers=0"), (without_handles, "raise ulimit -n")]
)
def test_what_a_loader_process_cannot_hand_over_is_said_by_it(limit, expected):
    found = next(iter(DataLoader(Clips(), batch_size=None, num_workers=1, worker_init_fn=limit)))
    assert isinstance(found, errors.EnvironmentFailure)
    with pytest.raises(errors.EnvironmentFailure, match=expected):
        raise found


def test_what_is_handed_over_arrives_as_it_was():
    found = list(DataLoader(Clips(), batch_size=None, num_workers=2))
    assert [clip.unique().tolist() for clip in found] == [[float(index)] for index in range(8)]
    # In the main process nothing has to be moved.
    assert not Clips()[0].is_shared()


def test_a_loader_process_that_dies_of_full_shared_memory_names_it():
    said = (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
    )
    assert "/dev/shm" in str(translate(RuntimeError(said)))


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (
            OSError(errno.EAGAIN, "Resource temporarily unavailable"),
            "temporarily unavailable; state is",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory; state is as last saved"),
        (
            OSError(errno.ENFILE, "Too many open files in system"),
            "in system; state is",
        ),
        (RuntimeError("can't start new thread"), "raise ulimit -u"),
        (OSError(errno.ENOENT, "No such file or directory", "run/metrics.jsonl"), "run/metrics.jsonl: No such file"),
    ],
)
def test_what_the_system_has_no_more_of_is_no_bug_of_the_program(failure, told):
    explained = translate(failure)
    assert explained.exit_code == errors.EXIT_ENVIRONMENT
    assert told in str(explained)


def test_locks_of_loader_processes_that_find_no_room_name_it():
    def make():
        with explaining_full_shared_memory():
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(errors.EnvironmentFailure, match="/dev/shm"):
        make()
    with pytest.raises(OSError, match="clips.tar"), explaining_full_shared_memory():
        raise OSError(errno.ENOSPC, "No space left on device", "clips.tar")


def can_mount():
    return (
        shutil.which("unshare") is not None
        and subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], capture_output=True
        ).returncode
        == 0
    )


@pytest.mark.skipif(not can_mount(), reason="needs root, to mount a small /dev/shm of its own")
def test_a_run_beside_a_full_shared_memory_ends_at_once_and_names_it(command, tmp_path):
    mount = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, "sh", *command, "batch_size=4", "duration=12", "num_workers=1"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 70
    assert "/dev/shm (0 MiB, 0 free): no room for what loader" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_processes_that_hang_are_not_waited_for():
    def broken_off():
        clips = iter(DataLoader(Clips(), batch_size=None, num_workers=2))
        with killing_loaders_when_interrupted():
            for clip in clips:
                # Not other children: a server that starts trainers may be one.
                for loader in multiprocessing.active_children():
                    psutil.Process(loader.pid).suspend()
                yield clip
                nonlocal begin
                begin = time.monotonic()
                raise errors.Interrupted("SIGTERM while waiting for data")

    begin = None
    with pytest.raises(errors.Interrupted):
        list(broken_off())
    # Each would be waited for by itself, for 5 s.
    assert time.monotonic() - begin < 4
