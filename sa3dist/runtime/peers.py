"""What ranks tell each other through the store besides results: that they live, and why they leave."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

import psutil
import torch.distributed as dist

from sa3dist import errors
from sa3dist.runtime.exit_status import translate
from sa3dist.runtime.liveness import Liveness
from sa3dist.runtime.run_lock import process_space

HEARTBEAT_SECONDS = 2.0
# A rank whose heart stands still this long counts as lost; loading a base may hold the interpreter for seconds.
# What follows, telling the others and leaving, must fit into a minute with it.
STALL_SECONDS = 30.0
# The first rank that cannot go on leaves its reason here, and all others take it.
END = "sa3dist/end"
# The first rank that is asked to stop while training leaves its reason here: others may be what it waits for.
STOP = "sa3dist/stop"
# Stages in which a rank that is asked to stop has saved, or is done.
HOLDING_STATE = ("train", "export")


def default_store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def explain(failure: Exception) -> errors.SA3DistError:
    """The explained failure that peers are told of; a bug of ours keeps its type in the message."""
    return translate(failure) or errors.SA3DistError(f"{type(failure).__name__}: {failure}")


def pack(problem: errors.SA3DistError | None, dist_rank: int) -> list[Any] | None:
    """A failure as JSON values, with the rank and host it comes from."""
    if problem is None:
        return None
    return [type(problem).__name__, str(problem), *(problem.origin or (dist_rank, socket.gethostname()))]


def unpack(packed: list[Any]) -> errors.SA3DistError:
    kind, message, dist_rank, host = packed
    problem = getattr(errors, kind, errors.SA3DistError)(message)
    problem.origin = (dist_rank, host)
    return problem


def left_key(dist_rank: int) -> str:
    return f"sa3dist/left/{dist_rank}"


def alive_key(dist_rank: int) -> str:
    return f"sa3dist/alive/{dist_rank}"


def heard_key(dist_rank: int) -> str:
    return f"sa3dist/heard/{dist_rank}"


def read(store: dist.Store, key: str) -> Any | None:
    """The JSON value under ``key``, or None."""
    return json.loads(store.get(key)) if store.check([key]) else None


def sign_of_life(count: int, liveness: Liveness) -> dict[str, Any]:
    """What a rank tells of itself; ``count`` makes each telling another."""
    said = {"count": count, "doing": liveness.doing, "step": liveness.step, "place": liveness.place}
    return said | {"host": socket.gethostname(), "pid": os.getpid(), "processes": process_space()}


def end_for_all(store: dist.Store, problem: errors.SA3DistError, dist_rank: int) -> errors.SA3DistError:
    """Make ``problem`` the reason all ranks end with, unless one is known already. Returns the one that holds."""
    held = store.compare_set(END, "", json.dumps(pack(problem, dist_rank)))
    return unpack(json.loads(held))


def leave(group, failure: Exception, heard: errors.SA3DistError | None) -> Exception:
    """Tell the peers why this rank leaves; returns what to report: for a lost peer, that peer's own reason or its name.

    heard   the reason of another rank, if this one has been told
    A peer that is gone shows first as a closed connection; which one it was, the hearts tell. During preparation it may
    show first as the stop signal that a launch agent sends to the others.
    """
    if group.world_size == 1:
        return failure
    store = default_store()
    stopped = isinstance(failure, errors.Interrupted) and group.liveness.stage not in HOLDING_STATE
    try:
        reason = failure
        if stopped:
            reason = _reason_of_the_stop(store, group.world_size) or failure
        if not isinstance(translate(failure), errors.LostPeer):
            packed = pack(explain(reason), group.dist_rank)
            store.set(left_key(group.dist_rank), json.dumps(packed))
            store.compare_set(END, "", json.dumps(packed))
        elif heard is not None:
            reason = heard
        else:
            found = _reason_of_the_lost(store, group)
            reason = failure if found is None else end_for_all(store, found, group.dist_rank)
        store.set(heard_key(group.dist_rank), "1")
        if group.is_main:
            _await_hearing(store, group.world_size)
        return reason
    except RuntimeError:
        # The store went with the rank that hosted it: nobody is left to tell.
        if heard is not None or not (stopped or isinstance(translate(failure), errors.LostPeer)):
            return heard or failure
        lost = errors.LostPeer(
            "gone, and the rendezvous store with it: killed, or its machine or network failed; state is as last saved, "
            "run again to continue"
        )
        lost.origin = (0, group.hosts[0])
        return lost


def leave_stopped(stopped: errors.Interrupted) -> errors.SA3DistError:
    """Tell the peers that this rank leaves preparation because it was asked to stop; returns why all leave.

    For a thread beside the main one, which may hold no Group yet. May block. Raises RuntimeError without the store.
    """
    store, dist_rank, world_size = default_store(), dist.get_rank(), dist.get_world_size()
    reason = _reason_of_the_stop(store, world_size) or stopped
    store.set(left_key(dist_rank), json.dumps(pack(reason, dist_rank)))
    reason = end_for_all(store, reason, dist_rank)
    store.set(heard_key(dist_rank), "1")
    if dist_rank == 0:
        _await_hearing(store, world_size)
    return reason


def _reason_of_the_stop(store: dist.Store, world_size: int) -> errors.SA3DistError | None:
    """Why this rank was stopped, if not to be stopped: an agent signals the peers of a rank that has failed.

    That rank has told why, or it was killed: its process is gone from this machine, and has not said goodbye.
    """
    told = read(store, END)
    if told is not None and not isinstance(unpack(told), errors.Interrupted):
        return unpack(told)
    for dist_rank in range(world_size):
        last = read(store, alive_key(dist_rank))
        here = last is not None and last["processes"] == process_space()
        if here and not _lives(last["pid"]) and not store.check([left_key(dist_rank)]):
            return lost_rank(dist_rank, last)
    return None


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _await_hearing(store: dist.Store, world_size: int) -> None:
    # Rank 0 may host the store, and a peer that finds it gone can only guess.
    deadline = time.monotonic() + 2 * HEARTBEAT_SECONDS + 1
    keys = [heard_key(dist_rank) for dist_rank in range(world_size)]
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.05)


def _reason_of_the_lost(store: dist.Store, group) -> errors.SA3DistError | None:
    peers = [dist_rank for dist_rank in range(group.world_size) if dist_rank != group.dist_rank]
    before = {dist_rank: read(store, alive_key(dist_rank)) for dist_rank in peers}
    # Everyone alive beats within this time, also a rank that fails for the same reason.
    deadline = time.monotonic() + 2 * HEARTBEAT_SECONDS + 1
    silent = set(peers)
    while time.monotonic() < deadline and silent:
        told = read(store, END)
        if told is not None:
            return unpack(told)
        silent = {n for n in silent if read(store, alive_key(n)) == before[n] and not store.check([left_key(n)])}
        time.sleep(0.2)
    if not silent:
        return None
    return lost_rank(min(silent), before[min(silent)])


def lost_rank(dist_rank: int, last: dict[str, Any] | None, how: str = "") -> errors.LostPeer:
    """The failure that stands for a rank that has gone or fallen silent. last: what it told of itself at the end."""
    at = f", last seen in step {last['step']} ({last['doing']})" if last else ""
    problem = errors.LostPeer(
        f"gone{at}{how}: killed, or its machine or network failed; state is as last saved, run again to continue"
    )
    problem.origin = (dist_rank, last["host"] if last else "unknown host")
    return problem
