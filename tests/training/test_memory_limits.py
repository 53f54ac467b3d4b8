"""What a step may take of memory, counted and limited in processes whose heap no other test has used."""

import ctypes
import functools
import multiprocessing
import resource
import socket
from pathlib import Path

import pytest
import torch

from sa3dist import errors
from sa3dist.runtime.signals import StopRequest
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import make_trainer

HOST = socket.gethostname()


@pytest.fixture(autouse=True, scope="module")
def imported_once():
    # The second is what a first step imports, which no limit is meant to meet.
    multiprocessing.set_forkserver_preload(["tests.helpers.trainers", "torch._dynamo"])


def _memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def _map_every_tensor_anew():
    """Returns what has to be kept for that: memory that was freed before and that the heap still holds."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    held = []
    for size in (1 << 24, 1 << 20, 1 << 16):
        mapped = _memory("VmSize")
        while _memory("VmSize") == mapped:
            held.append(torch.empty(size, dtype=torch.uint8))
    return held


def _step_and_bytes(checkpointing, group):
    trainer, batch = make_trainer(group, 9, times=30)
    trainer.base.gradient_checkpointing = checkpointing
    freed_before = _map_every_tensor_anew()
    before = _memory("VmSize")
    figures = trainer.take_step(iter([batch]), StopRequest())
    assert freed_before
    return _memory("VmPeak") - before, figures["loss"], trainer.engine.flat.values.tolist()


def _step_within(limit_bytes, recomputing, plan, group):
    trainer, batch = make_trainer(group, 9, times=30, **plan)
    trainer.base.gradient_checkpointing = recomputing
    trainer.group.gather("connected")
    freed_before = _map_every_tensor_anew()
    if group.dist_rank == 1:
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + limit_bytes,) * 2)
    try:
        figures = trainer.take_step(iter([batch]), StopRequest())
    except errors.EnvironmentFailure as failure:
        return type(failure).__name__, failure.origin, str(failure)
    assert freed_before
    return figures["loss"], trainer.engine.flat.values.tolist()


def _bytes_of_a_step(checkpointing):
    return run_ranks(1, functools.partial(_step_and_bytes, checkpointing), method="forkserver")[0]


def _steps_within(limit_bytes, recomputing=False, **plan):
    """Two ranks, of which the second may map ``limit_bytes`` more than it has."""
    return run_ranks(2, functools.partial(_step_within, limit_bytes, recomputing, plan), method="forkserver")


@pytest.mark.slow
def test_out_of_memory_on_one_rank_ends_all_and_fits_with_recomputed_blocks_which_change_no_bit():
    (needed, _, _), (enough, _, _) = _bytes_of_a_step(False), _bytes_of_a_step(True)
    assert needed > 1.3 * enough
    between = (needed + enough) // 2
    for kind, origin, message in _steps_within(between):
        assert (kind, origin) == ("OutOfMemory", (1, HOST))
        assert "gradient_checkpointing=on" in message
    for kind, origin, message in _steps_within(between, adapt_memory=True):
        assert (kind, origin) == ("RecomputeOnRestart", (1, HOST))
        assert message.startswith("step 1: out of memory")
    recomputing = _steps_within(between, recomputing=True, adapt_memory=True)
    assert recomputing == _steps_within(1 << 40)


def test_memory_that_recomputing_cannot_save_is_said_with_what_to_change():
    for kind, origin, message in _steps_within(1 << 20, recomputing=True, adapt_memory=True):
        assert (kind, origin) == ("EnvironmentFailure", (1, HOST))
        assert "recomputing blocks is not enough" in message
        assert "batch_size (2)" in message
