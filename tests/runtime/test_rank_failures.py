"""What keeps a run alive, and what ends it in time: saves beside the training, time limits, hangs."""

import errno
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from sa3dist import config, errors, loop
from sa3dist.runtime import run_lock
from sa3dist.runtime.exit_status import run_program
from sa3dist.runtime.liveness import AVERAGING, Unchanged
from sa3dist.runtime.peers import leave
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import EXIT_SECONDS, StopRequest, seconds_since_start
from sa3dist.runtime.watchdog import Watchdog
from sa3dist.training import checkpoint
from sa3dist.training.checkpoint import Saver
from tests.helpers.ranks import exit_codes, run_ranks
from tests.helpers.trainers import make_settings, make_trainer

HOST = socket.gethostname()


def forever(batch):
    while True:
        yield batch


def status(output_dir: Path) -> dict:
    return json.loads((output_dir / "status.json").read_text())


# Time limits.


@pytest.mark.parametrize(
    ("given", "seconds"), [("90", 90), (90.5, 90.5), ("1:30:00", 5400), ("0:00:05", 5), ("2-01:00:00", 49 * 3600)]
)
def test_the_allowed_time_is_read_as_seconds_or_as_slurm_writes_it(given, seconds):
    read = config.build(config.read_arguments(["audio_data_url=clips.zip", f"max_wall_time={given}"]))
    assert read.max_wall_time == seconds


@pytest.mark.parametrize("given", ["soon", "0", "-5", "1:70:00", ".inf"])
def test_an_allowed_time_that_is_none_is_refused(given):
    with pytest.raises(errors.ConfigError, match="^max_wall_time: "):
        config.build(config.read_arguments(["audio_data_url=clips.zip", f"max_wall_time={given}"]))


def test_the_margin_grows_with_what_steps_and_saves_take():
    stop = StopRequest()
    stop.limit(seconds_since_start() + EXIT_SECONDS + 60)
    assert not stop.requested()
    stop.reserve(step_seconds=10, save_seconds=5)
    assert not stop.requested()
    stop.reserve(step_seconds=10, save_seconds=25)
    assert stop.requested()
    assert "max_wall_time" in stop.reason
    with pytest.raises(errors.Interrupted, match="max_wall_time.* while encoding"):
        stop.raise_if_requested("encoding")


def test_the_time_since_the_start_includes_what_ran_before_this_module():
    begin = time.monotonic()
    before = seconds_since_start()
    time.sleep(0.1)
    assert 0.1 <= seconds_since_start() - before <= time.monotonic() - begin + 0.01
    assert before > time.process_time() / (os.cpu_count() or 1)


def test_a_run_whose_time_is_up_on_one_rank_saves_on_all(tmp_path):
    def work(group):
        stop = StopRequest()
        if group.dist_rank == 1:
            stop.limit(seconds_since_start() + EXIT_SECONDS + 1)
        trainer, batch = make_trainer(group, 10**6, make_settings(save_every=10**6))
        try:
            loop.train(trainer, forever(batch), stop, tmp_path, None)
        except errors.Interrupted as end:
            return trainer.step, str(end)

    ended = run_ranks(2, work)
    saved = checkpoint.find(tmp_path, "auto")
    assert [step for step, _ in ended] == [saved.step] * 2
    assert "max_wall_time" in ended[1][1]


# Signals.


def test_repeats_and_signals_during_a_save_are_the_same_request_and_a_later_one_ends_at_once(tmp_path, monkeypatch):
    def work(group):
        stop = StopRequest().install()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        # From here on the first one is long past.
        monkeypatch.setattr("sa3dist.runtime.signals.SAME_REQUEST_SECONDS", -1.0)
        stop.saving = True
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.saving = False
        (tmp_path / "lived through four").touch()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    assert exit_codes(1, work) == [errors.EXIT_INTERRUPTED]
    assert (tmp_path / "lived through four").exists()


# Saves beside the training.


def test_training_goes_on_while_a_save_is_in_flight_and_no_signal_ends_it(tmp_path, monkeypatch):
    trainer, batch = make_trainer(Group(0, 1, torch.device("cpu")), 5)
    stop, going_on = StopRequest(), []
    write = checkpoint.save

    def slow(*arguments):
        deadline = time.monotonic() + 30
        while trainer.step < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        going_on.append((trainer.step, stop.saving))
        write(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    loop.train(trainer, forever(batch), stop, tmp_path, None)
    # The save of step 2 saw step 3 done; the last one was waited for.
    assert going_on[0] == (3, True)
    assert checkpoint.find(tmp_path, "auto").step == 5
    assert not stop.saving
    assert checkpoint.load(checkpoint.path_of(tmp_path, 4)).state["next_slot"] == 8


def test_data_that_fails_once_steps_were_taken_ends_a_run_that_can_go_on(tmp_path):
    def batches(good):
        yield from [batch] * good
        raise errors.DataError("https://host/shard-000000.tar: not found; check the address")

    trainer, batch = make_trainer(Group(0, 1, torch.device("cpu")), 5)
    with pytest.raises(errors.DataError, match="check the address$"):
        loop.train(trainer, batches(0), StopRequest(), tmp_path, None)
    with pytest.raises(errors.EnvironmentFailure, match="check the address; state is as last saved$"):
        loop.train(trainer, batches(3), StopRequest(), tmp_path, None)
    assert checkpoint.find(tmp_path, "auto").step == 2


def test_what_is_saved_is_the_state_of_its_step_whatever_comes_after(tmp_path, monkeypatch):
    group = Group(0, 1, torch.device("cpu"))
    settings = make_settings(keep_checkpoints=9)
    trainer, batch = make_trainer(group, 6, settings)
    loop.train(trainer, forever(batch), StopRequest(), tmp_path / "beside", None)
    for step in (2, 4):
        alone, batch = make_trainer(group, step, settings)
        loop.train(alone, forever(batch), StopRequest(), tmp_path / f"to-{step}", None)
        expected = checkpoint.load(checkpoint.path_of(tmp_path / f"to-{step}", step))
        found = checkpoint.load(checkpoint.path_of(tmp_path / "beside", step))
        assert all(torch.equal(value, found.adapters[name]) for name, value in expected.adapters.items())
        for moment, tensors in expected.moments.items():
            assert all(torch.equal(value, found.moments[moment][name]) for name, value in tensors.items())


def test_a_save_that_fails_ends_all_ranks_at_the_next_step_with_its_reason(tmp_path):
    # A file where the checkpoints should go.
    (tmp_path / "checkpoints").write_text("")

    def work(group):
        trainer, batch = make_trainer(group, 10**6)
        third_is_asked_for, write = threading.Event(), checkpoint.save

        def held(*arguments):
            assert third_is_asked_for.wait(60)
            write(*arguments)

        def batches():
            yield from [batch] * 2
            # Step 3 began beside the save of step 2, which fails before step 4 begins.
            third_is_asked_for.set()
            while trainer.saver.busy:
                time.sleep(0.01)
            yield from forever(batch)

        checkpoint.save = held
        try:
            loop.train(trainer, batches(), StopRequest(), tmp_path, None)
        except errors.EnvironmentFailure as failure:
            return trainer.step, failure.origin, str(failure)

    ended = run_ranks(2, work)
    assert ended[0] == ended[1]
    step, origin, message = ended[0]
    assert step == 3
    assert origin == (0, HOST)
    assert "checkpoints" in message


def test_a_process_killed_during_a_save_leaves_the_one_before(tmp_path):
    def work(group):
        fsync = os.fsync

        def killed(handle):
            if "step-00000004" in os.readlink(f"/proc/self/fd/{handle}"):
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        os.fsync = killed
        trainer, batch = make_trainer(group, 10**6)
        loop.train(trainer, forever(batch), StopRequest(), tmp_path, None)

    assert exit_codes(1, work) == [-signal.SIGKILL]
    assert checkpoint.find(tmp_path, "auto").step == 2
    assert [path.name for path in checkpoint.list_all(tmp_path)] == ["step-00000002"]


def test_a_saver_tells_of_a_failure_once_and_finishes_one_save_before_the_next():
    saver, order = Saver(), []

    def fail():
        time.sleep(0.1)
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    saver.start(fail, lambda: order.append("failed"))
    with pytest.raises(OSError, match="No space"):
        saver.start(lambda: order.append("second"), lambda: None)
    assert order == ["failed"]
    saver.start(lambda: order.append("third"), lambda: None)
    saver.wait()
    assert order == ["failed", "third"]


def test_a_rank_that_fails_leaves_rank_0_the_time_to_finish_a_save_before_it_speaks(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sa3dist.runtime.peers.HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr("sa3dist.runtime.watchdog.GRACE_SECONDS", 0.5)
    monkeypatch.setattr("sa3dist.runtime.exit_status.REPORT_SECONDS", 0.1)

    def work(group):
        stop = StopRequest()

        def body():
            with Watchdog(stop, tmp_path).watch(group) as watchdog:
                stop.saving = True
                dist.barrier()
                try:
                    if group.dist_rank == 1:
                        raise errors.DataError("clips.zip: gone")
                    time.sleep(2.0)
                    if not (tmp_path / "status.json").exists():
                        (tmp_path / "saved while nobody had spoken").touch()
                    stop.saving = False
                    time.sleep(60)
                except errors.DataError as failure:
                    raise leave(group, failure, watchdog.told) from None

        os._exit(run_program(body, lambda: tmp_path, lambda: 3))

    assert exit_codes(2, work) == [2, 2]
    assert (tmp_path / "saved while nobody had spoken").exists()
    assert [line for line in capfd.readouterr().err.splitlines() if "gone" in line] == [status(tmp_path)["message"]]
    assert (status(tmp_path)["dist_rank"], status(tmp_path)["exit_code"]) == (1, 2)


# Hangs.


def test_a_value_is_still_by_ticks_so_that_a_suspended_process_has_not_stood_still():
    still = Unchanged()
    assert [still.look(value, 0.5) for value in "aaab"] == [0, 0.5, 1.0, 0]


def test_a_process_that_stands_still_ends_with_70_and_says_where(tmp_path, capfd):
    def work(group):
        stop = StopRequest()
        with Watchdog(stop, tmp_path).watch(group):
            group.liveness.enter("train", 1.0)
            group.liveness.begin("waiting for data", step=7)
            time.sleep(120)

    assert exit_codes(1, work) == [70]
    said = status(tmp_path)
    assert capfd.readouterr().err == said["message"] + "\n"
    # Of one process nobody asks which; the status tells all the same.
    assert said["message"].startswith("step 7: no progress for 1 s (waiting for data)")
    assert (said["exit_code"], said["dist_rank"], said["host"], said["step"]) == (70, 0, HOST, 6)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["stage"] == "failed"


def test_ranks_that_wait_for_a_stuck_one_name_it(tmp_path, capfd):
    def work(group):
        with Watchdog(StopRequest(), tmp_path).watch(group):
            group.liveness.enter("train", 3.0)
            group.liveness.begin("beginning", step=5)
            group.liveness.begin("waiting for data")
            if group.dist_rank == 1:
                time.sleep(120)
            group.liveness.begin(AVERAGING)
            dist.all_reduce(torch.zeros(4))

    assert exit_codes(3, work) == [70, 70, 70]
    # But for what torch itself says of a connection that a leaving peer closes.
    lines = capfd.readouterr().err.splitlines()
    said = [line for line in lines if "rank" in line and not line.startswith("[rank")]
    assert said == [status(tmp_path)["message"]]
    assert said[0].startswith(f"rank 1 on {HOST}: ")
    assert "step 5" in said[0]


def test_a_killed_rank_is_named_by_those_that_lose_it(tmp_path, capfd):
    def work(group):
        with Watchdog(StopRequest(), tmp_path).watch(group) as watchdog:
            group.liveness.begin("computing gradients", step=2)
            dist.barrier()
            if group.dist_rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                dist.all_reduce(torch.zeros(4))
            except RuntimeError as failure:
                reason = leave(group, failure, watchdog.told)
                os._exit(reason.exit_code if reason.origin == (2, HOST) else 1)

    assert exit_codes(3, work) == [70, 70, -signal.SIGKILL]


@pytest.mark.parametrize(
    ("killed", "stage", "expected"),
    [(1, "encode", [70, -9]), (0, "encode", [-9, 70]), (None, "encode", [75, 75]), (1, "train", [75, -9])],
)
def test_a_rank_that_an_agent_stops_for_the_sake_of_a_killed_one_names_that(
    tmp_path, monkeypatch, killed, stage, expected
):
    # How long rank 0 waits to be heard, by one that cannot.
    monkeypatch.setattr("sa3dist.runtime.peers.HEARTBEAT_SECONDS", 0.1)

    def work(group):
        with Watchdog(StopRequest(), tmp_path).watch(group) as watchdog:
            group.liveness.enter(stage)
            processes = [psutil.Process(pid) for pid in group.gather(os.getpid())]
            if group.dist_rank == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            if killed is not None:
                with pytest.raises(RuntimeError):
                    dist.barrier()
                # An agent signals the others once the killed one has ended; its connections close before.
                while processes[killed].is_running() and processes[killed].status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)
            reason = leave(group, errors.Interrupted("SIGTERM while encoding"), watchdog.told)
            named = isinstance(reason, errors.Interrupted) or reason.origin[0] == killed
            os._exit(reason.exit_code if named else 1)

    assert exit_codes(2, work) == expected


def test_ranks_that_a_store_keeps_waiting_end_without_asking_it_for_the_last_word(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sa3dist.runtime.peers.STALL_SECONDS", 3.0)
    monkeypatch.setattr("sa3dist.runtime.watchdog.ANSWER_SECONDS", 0.5)

    def work(group):
        with Watchdog(StopRequest(), tmp_path).watch(group):
            group.liveness.enter("train", 600.0)
            group.liveness.begin("waiting for data", step=3)
            if group.dist_rank == 0:
                # With the store, as when its host is gone: nobody answers, nothing is closed.
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(120)

    ended = exit_codes(2, work, stopped=(0,))
    assert ended == [None, 70]
    said = status(tmp_path)
    assert said["message"] in capfd.readouterr().err
    assert said["message"].startswith(f"rank 1 on {HOST}: no contact with the rendezvous store")
    assert "host of rank 0 (host-0)" in said["message"]


def test_the_heartbeat_is_renewed_while_there_is_progress_and_only_then(tmp_path, monkeypatch):
    monkeypatch.setattr("sa3dist.runtime.run_lock.BEAT_SECONDS", 0.05)
    group, path = Group(0, 1, torch.device("cpu")), tmp_path / "heartbeat.json"

    def beat(step):
        group.liveness.begin("computing gradients", step=step)
        deadline = time.monotonic() + 30
        while not path.exists() or json.loads(path.read_text())["step"] != step:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return path.stat().st_mtime_ns

    with Watchdog(StopRequest(), tmp_path).watch(group) as watchdog:
        run_lock.take(tmp_path, each_beat=watchdog.heartbeat.renew)
        group.liveness.enter("train", 600)
        first, second = beat(1), beat(2)
        assert second > first
        time.sleep(0.3)
        assert path.stat().st_mtime_ns == second
        said = json.loads(path.read_text())
    assert (said["stage"], said["host"], said["pid"]) == ("train", HOST, os.getpid())
    assert abs(said["time"] - time.time()) < 60
    assert json.loads(path.read_text())["stage"] == "done"
    # However long the lock is kept beyond.
    group.liveness.progress()
    time.sleep(0.2)
    assert json.loads(path.read_text())["stage"] == "done"
    run_lock.release(tmp_path)


def test_a_refused_run_leaves_no_heartbeat(tmp_path):
    group = Group(0, 1, torch.device("cpu"))

    def refused():
        with Watchdog(StopRequest(), tmp_path).watch(group):
            (tmp_path / "heartbeat.json").write_text("{}")
            raise errors.ConfigError("rank: no")

    with pytest.raises(errors.ConfigError):
        refused()
    assert not list(tmp_path.iterdir())
