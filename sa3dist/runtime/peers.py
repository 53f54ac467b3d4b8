"""Rank liveness and exit reasons, shared through the rendezvous store."""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sa3dist import errors
from sa3dist.runtime import run_lock
from sa3dist.runtime.exit_status import translate
from sa3dist.runtime.liveness import Liveness

if TYPE_CHECKING:
    from sa3dist.runtime.process_group import Group

HEARTBEAT_SECONDS = 2.0
# A rank without a heartbeat for this long counts as lost; loading a base may hold the interpreter for seconds. Telling
# the others and leaving must fit into the rest of a minute.
STALL_SECONDS = 30.0
# How long rank 0 waits at a good end until the others have read what it left in the store.
GOODBYE_SECONDS = 30.0
# Key of the reason to end: the first rank that cannot go on writes it, all others adopt it.
END = "sa3dist/end"
# Key of the reason to stop, from the first rank asked to stop while training: others may be waiting for that rank.
STOP = "sa3dist/stop"
# By rank: what it is doing, renewed every HEARTBEAT_SECONDS; and that it no longer needs the store.
ALIVE, LEFT = "sa3dist/alive/{}", "sa3dist/left/{}"


def default_store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def pack(failure: Exception | None, dist_rank: int) -> list[Any] | None:
    """A failure as JSON values, with its rank and host. A bug of ours keeps its type in the message."""
    if failure is None:
        return None
    problem = translate(failure) or errors.SA3DistError(f"{type(failure).__name__}: {failure}")
    return [type(problem).__name__, str(problem), *(problem.origin or (dist_rank, socket.gethostname()))]


def unpack(packed: list[Any]) -> errors.SA3DistError:
    kind, message, dist_rank, host = packed
    problem = getattr(errors, kind, errors.SA3DistError)(message)
    problem.origin = (dist_rank, host)
    return problem


def read(store: dist.Store, key: str) -> Any | None:
    """The JSON value under ``key``, or None."""
    return json.loads(store.get(key)) if store.check([key]) else None


def say_alive(store: dist.Store, dist_rank: int, liveness: Liveness) -> None:
    """Publish what this rank is doing; ``at`` makes each value differ from the one before."""
    said = {"at": time.monotonic(), "doing": liveness.doing, "step": liveness.step, "place": liveness.place}
    store.set(ALIVE.format(dist_rank), json.dumps(said | run_lock.this_process()))


def end_for_all(failure: Exception, group: Group) -> Exception:
    """Make ``failure`` the reason for all ranks to end. Returns it, or the reason another rank gave before."""
    if group.world_size == 1:
        return failure
    packed = json.dumps(pack(failure, group.dist_rank))
    held = default_store().compare_set(END, "", packed).decode()
    return failure if held == packed else unpack(json.loads(held))


def leave(group: Group, failure: Exception, told: errors.SA3DistError | None = None) -> Exception:
    """Tell the peers why this rank ends. Returns the error to report: for a lost peer, that peer's own reason or name.

    told   the reason of another rank, if this rank has read one
    A lost peer first shows as a closed connection; missing heartbeats then tell which peer it was. During preparation
    it may first show as the stop signal that a launch agent sends to the others. May block: the store may not answer.
    """
    if group.world_size == 1:
        return failure
    stopped = isinstance(failure, errors.Interrupted) and not group.liveness.holds_state
    lost_contact = isinstance(translate(failure), errors.LostPeer)
    reason = failure
    try:
        if stopped:
            reason = end_for_all(_killed_peer(group) or failure, group)
        elif lost_contact:
            reason = told or _lost_peer(group) or failure
        else:
            end_for_all(failure, group)
        part(group, 2 * HEARTBEAT_SECONDS + 1)
    except RuntimeError:
        # The store is gone with the rank that hosted it.
        if told is None and (stopped or lost_contact):
            return lost_rank(0, {"host": group.hosts[0]}, ", and the rendezvous store with it")
        return told or reason
    return reason


def part(group: Group, seconds: float) -> None:
    """Say that this rank no longer needs the store. Rank 0, which may host it, waits for the others for ``seconds``."""
    if group.world_size > 1:
        store, deadline = default_store(), time.monotonic() + seconds
        store.set(LEFT.format(group.dist_rank), "1")
        keys = [LEFT.format(dist_rank) for dist_rank in range(group.world_size)]
        while group.is_main and not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)


def _killed_peer(group: Group) -> errors.LostPeer | None:
    """The rank on this machine whose process is gone without having left; an agent then signals its peers."""
    store = default_store()
    for dist_rank in range(group.world_size):
        last = read(store, ALIVE.format(dist_rank))
        if last is not None and run_lock.lives(last) is False and not store.check([LEFT.format(dist_rank)]):
            return lost_rank(dist_rank, last)
    return None


def _lost_peer(group: Group) -> Exception | None:
    """Why another rank has left, or which one has no heartbeat."""
    store = default_store()
    before = {n: read(store, ALIVE.format(n)) for n in range(group.world_size) if n != group.dist_rank}
    # Every live rank renews its key within this time, even one that fails for the same reason.
    deadline = time.monotonic() + 2 * HEARTBEAT_SECONDS + 1
    silent = set(before)
    while time.monotonic() < deadline and silent:
        if (told := read(store, END)) is not None:
            return unpack(told)
        silent = {n for n in silent if read(store, ALIVE.format(n)) == before[n] and not store.check([LEFT.format(n)])}
        time.sleep(0.2)
    return end_for_all(lost_rank(min(silent), before[min(silent)]), group) if silent else None


def lost_rank(dist_rank: int, last: dict[str, Any] | None, how: str = "") -> errors.LostPeer:
    """The error for a rank that is gone or silent. last: its last heartbeat."""
    at = f", last seen in step {last['step']} ({last['doing']})" if last and "step" in last else ""
    problem = errors.LostPeer(
        f"gone{at}{how}: killed, or its machine or network failed; state is as last saved, run again to continue"
    )
    problem.origin = (dist_rank, last["host"] if last else "unknown host")
    return problem
