"""Ranks that wait for rank 0's work: results and failures reach them, and none keeps another from leaving."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from sa3dist import errors
from sa3dist.runtime.peers import GOODBYE_SECONDS, leave
from sa3dist.runtime.process_group import Group, backend_for, main_process_first
from sa3dist.runtime.signals import StopRequest


@pytest.fixture
def ranks(monkeypatch):
    """Runs main_process_first as two ranks, in threads with one store; how each ended, and rank 0's seconds."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    ended, seconds = {}, {}

    def rank(number, work, stop):
        began = time.monotonic()
        try:
            ended[number] = main_process_first(Group(number, 2, torch.device("cpu")), "work", work, stop)
        except errors.SA3DistError as error:
            ended[number] = leave(Group(number, 2, torch.device("cpu")), error)
        seconds[number] = time.monotonic() - began

    def run(work, stop=None):
        threads = [threading.Thread(target=rank, args=(number, work, stop)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ended, seconds[0]

    return run


def test_the_result_reaches_the_waiting_rank(ranks):
    assert ranks(lambda: {"clips": 7})[0] == {0: {"clips": 7}, 1: {"clips": 7}}


def test_the_failure_reaches_the_waiting_rank(ranks):
    def work():
        raise errors.DataError("clip 3: silent")

    ended, _ = ranks(work)
    assert [(type(error), str(error)) for error in ended.values()] == [(errors.DataError, "clip 3: silent")] * 2


def test_ranks_that_are_all_asked_to_stop_do_not_wait_for_each_other(ranks):
    def work():
        time.sleep(0.5)
        raise errors.Interrupted("stopped while working")

    stop = StopRequest()
    stop.hear("SIGTERM")
    ended, seconds = ranks(work, stop)
    assert all(isinstance(error, errors.Interrupted) for error in ended.values())
    assert seconds < GOODBYE_SECONDS / 2


@pytest.mark.parametrize(
    ("here", "everywhere", "gpus", "expected"),
    [(2, 2, 1, {"backend": "gloo"}), (2, 2, 2, {}), (1, 1, 1, {}), (2, 4, 1, {}), (3, 3, 2, {"backend": "gloo"})],
)
def test_processes_that_share_a_gpu_exchange_over_gloo_and_it_is_said(
    monkeypatch, caplog, here, everywhere, gpus, expected
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setenv("WORLD_SIZE", str(everywhere))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert backend_for(on_cpu=False) == expected
    assert (f"{here} processes share {gpus} GPU(s)" in caplog.text) == bool(expected)
    assert backend_for(on_cpu=True) == {}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert backend_for(on_cpu=False) == {}
