"""The processes of one run acting as one: rank, world size, reductions, and waiting without a time limit."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sa3dist import errors
from sa3dist.parallel import zero_config
from sa3dist.parallel.outcome import translate

# Waiting ranks look this often whether rank 0 is done: a poll, for preparation outlasts any collective
POLL_SECONDS = 0.05
# How long rank 0 waits for its peers to read what it has to say.
READERS_SECONDS = 30.0
HEARTBEAT_SECONDS = 3.0
# A rank whose heart stands still this long counts as lost; loading a base may hold the interpreter for seconds.
STALL_SECONDS = 50.0

_ended = threading.Event()


@dataclasses.dataclass(frozen=True)
class Group:
    """This process among its peers. dist_rank 0 writes; ``device`` is where this process computes.

    deepspeed   the launcher's DeepSpeed configuration as read; None outside of that mode
    """

    dist_rank: int
    world_size: int
    device: torch.device
    deepspeed: dict[str, Any] | None = None

    @property
    def is_main(self) -> bool:
        return self.dist_rank == 0

    def sum_(self, flat: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(flat)
        return flat

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)

    def any(self, mine: bool) -> bool:
        """Whether it is true on any process."""
        return self.sum_(torch.tensor(float(mine), device=self.device)).item() > 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def tell(self, name: str, value: Any) -> None:
        """Leave a JSON value where every rank may look for it; nobody waits."""
        _store().set(name, json.dumps(value))

    def told(self, name: str) -> Any | None:
        """What a rank has left under ``name`` last, or None."""
        return json.loads(_store().get(name)) if _store().check([name]) else None

    def agree(self, problem: errors.SA3DistError | None) -> None:
        """Raise the first rank's problem on every rank, or return on all of them.

        A rank that fails alone would leave its peers waiting in the next collective.
        """
        for dist_rank, found in enumerate(self.gather(_pack(problem))):
            if found is not None:
                raise _unpack(found, dist_rank, self)


def connect() -> Group:
    """Join the process group the launcher prepared: accelerate, torchrun or plain python.

    Accelerate is made with mixed precision off whatever the launcher says; the step autocasts itself, so that adapters,
    gradients and moments stay float32 in every mode.
    """
    from accelerate import Accelerator

    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    if zero_config.asked_for():
        zero_config.prepare_environment(on_cpu)
        # Told of a CPU, Accelerate would pass DeepSpeed over without a word.
        on_cpu = False
    accelerator = Accelerator(mixed_precision="no", cpu=on_cpu)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        # It would make transformers divide the text encoder as it loads.
        plugin.dschf = None
    # Under gloo Accelerate says "cpu:0", a name that file readers do not know.
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
    if dist.is_initialized():
        # Not accelerator.num_processes: it is 1 on every rank under DeepSpeed on CPU.
        group = Group(dist.get_rank(), dist.get_world_size(), device, plugin and plugin.deepspeed_config)
        if group.world_size > 1:
            _ended.clear()
            threading.Thread(target=_beat, args=(_store(), group.dist_rank), daemon=True).start()
        return group
    return Group(0, 1, device)


def disconnect() -> None:
    _ended.set()
    if dist.is_initialized():
        dist.destroy_process_group()


def on_main_first(group: Group, name: str, work: Callable[[], Any], should_stop: Callable[[], bool]) -> Any:
    """Run ``work`` on rank 0 while the others wait, however long; its JSON result, or its failure, reaches all ranks.

    name          unique per call within a run
    should_stop   polled by waiting ranks; a stop request there raises Interrupted
    """
    if group.world_size == 1:
        return work()
    store, key = _store(), f"sa3dist/{name}"
    if group.is_main:
        try:
            result = {"result": work()}
        except Exception as failure:
            store.set(key, json.dumps({"problem": _pack(explain(failure))}))
            _await_readers(store, key, group)
            raise
        store.set(key, json.dumps(result))
        _await_readers(store, key, group)
        return result["result"]
    try:
        _wait_for(store, key, 0, group, should_stop)
        result = json.loads(store.get(key))
    finally:
        # A rank that leaves without reading must not be waited for either.
        store.add(f"{key}/read", 1)
    if "problem" in result:
        raise _unpack(result["problem"], 0, group)
    return result["result"]


def _await_readers(store: dist.Store, key: str, group: Group) -> None:
    # Rank 0 may host the store: it must not leave before its peers have read.
    deadline = time.monotonic() + READERS_SECONDS
    while store.add(f"{key}/read", 0) < group.world_size - 1 and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def all_done(group: Group, name: str, problem: errors.SA3DistError | None, should_stop: Callable[[], bool]) -> None:
    """Wait, however long, until every rank has come here; raise on all ranks what any of them brought along."""
    if group.world_size == 1:
        if problem is not None:
            raise problem
        return
    store = _store()
    store.set(f"sa3dist/{name}/{group.dist_rank}", json.dumps(_pack(problem)))
    found = []
    try:
        for dist_rank in range(group.world_size):
            key = f"sa3dist/{name}/{dist_rank}"
            _wait_for(store, key, dist_rank, group, should_stop)
            found.append(json.loads(store.get(key)))
    finally:
        if not group.is_main:
            store.add(f"sa3dist/{name}/read", 1)
    if group.is_main:
        _await_readers(store, f"sa3dist/{name}", group)
    for dist_rank, packed in enumerate(found):
        if packed is not None:
            raise _unpack(packed, dist_rank, group)


def together(group: Group, name: str, work: Callable[[], Any], should_stop: Callable[[], bool]) -> Any:
    """Run ``work`` on every rank; when it fails on any, it fails on all, with that rank's reason."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    try:
        all_done(group, name, None if failure is None else explain(failure), should_stop)
    except errors.SA3DistError as problem:
        # A bug of ours keeps its traceback on the rank that has it.
        raise problem if failure is None or isinstance(failure, errors.SA3DistError) else failure from None
    return result


def leave(group: Group, failure: Exception) -> Exception:
    """Tell the waiting peers why this rank leaves; returns what to report: for a lost peer, that peer's own reason."""
    if group.world_size == 1:
        return failure
    try:
        if isinstance(translate(failure), errors.LostPeer):
            for dist_rank in range(group.world_size):
                if dist_rank != group.dist_rank and _store().check([_left(dist_rank)]):
                    return _unpack(json.loads(_store().get(_left(dist_rank))), dist_rank, group)
        else:
            _store().set(_left(group.dist_rank), json.dumps(_pack(explain(failure))))
    except RuntimeError:
        # The store went with the rank that hosted it: nobody is left to tell.
        return failure
    return failure


def _left(dist_rank: int) -> str:
    return f"sa3dist/left/{dist_rank}"


def _alive(dist_rank: int) -> str:
    return f"sa3dist/alive/{dist_rank}"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _beat(store: dist.Store, dist_rank: int) -> None:
    count = 0
    while not _ended.wait(HEARTBEAT_SECONDS):
        count += 1
        try:
            store.set(_alive(dist_rank), str(count))
        except RuntimeError:
            # The store is gone, and the run with it.
            return


def _wait_for(store: dist.Store, key: str, awaited: int, group: Group, should_stop: Callable[[], bool]) -> None:
    """Return when ``key`` is set. Raises when asked to stop, and when the awaited rank has left or stopped beating."""
    seen, since = None, time.monotonic()
    while not store.check([key]):
        if should_stop():
            raise errors.Interrupted(f"stopped while waiting for rank {awaited}; run the same command to continue")
        if awaited != group.dist_rank and store.check([_left(awaited)]) and not store.check([key]):
            raise _unpack(json.loads(store.get(_left(awaited))), awaited, group)
        beat = store.get(_alive(awaited)) if store.check([_alive(awaited)]) else b""
        if beat != seen:
            seen, since = beat, time.monotonic()
        elif time.monotonic() - since > STALL_SECONDS:
            raise errors.LostPeer(f"rank {awaited} has not answered for {STALL_SECONDS:.0f} s; state is as last saved")
        time.sleep(POLL_SECONDS)


def explain(failure: Exception) -> errors.SA3DistError:
    """The explained failure that peers are told of; a bug of ours keeps its type in the message."""
    return translate(failure) or errors.SA3DistError(f"{type(failure).__name__}: {failure}")


def _pack(problem: errors.SA3DistError | None) -> list[str] | None:
    return None if problem is None else [type(problem).__name__, str(problem)]


def _unpack(packed: list[str], dist_rank: int, group: Group) -> errors.SA3DistError:
    kind, message = packed
    # What rank 0 found it says for all; any other rank's finding is that rank's.
    where = "" if dist_rank in (0, group.dist_rank) else f"rank {dist_rank}: "
    return getattr(errors, kind, errors.SA3DistError)(where + message)
