"""The processes of one run acting as one: rank, world size, reductions, and waiting without a time limit."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sa3dist import errors

# Waiting ranks look this often whether rank 0 is done: a poll, for preparation outlasts any collective
POLL_SECONDS = 0.2
# How long a failing rank 0 waits for its peers to read the reason.
READERS_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Group:
    """This process among its peers. dist_rank 0 writes; ``device`` is where this process computes."""

    dist_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.dist_rank == 0

    def sum_(self, flat: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(flat)
        return flat

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

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
    accelerator = Accelerator(mixed_precision="no", cpu=on_cpu)
    # Under gloo Accelerate says "cpu:0", a name that file readers do not know.
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
    if dist.is_initialized():
        # Not accelerator.num_processes: it is 1 on every rank under DeepSpeed on CPU.
        return Group(dist.get_rank(), dist.get_world_size(), device)
    return Group(0, 1, device)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def on_main_first(group: Group, name: str, work: Callable[[], Any], should_stop: Callable[[], bool]) -> Any:
    """Run ``work`` on rank 0 while the others wait, however long; its JSON result, or its failure, reaches all ranks.

    name          unique per call within a run
    should_stop   polled by waiting ranks; a stop request there raises Interrupted
    """
    if group.world_size == 1:
        return work()
    store = dist.distributed_c10d._get_default_store()
    key = f"sa3dist/{name}"
    if group.is_main:
        try:
            result = {"result": work()}
        except Exception as failure:
            known = isinstance(failure, errors.SA3DistError)
            problem = failure if known else errors.SA3DistError(f"{type(failure).__name__}: {failure}")
            store.set(key, json.dumps({"problem": _pack(problem)}))
            _await_readers(store, key, group)
            raise
        store.set(key, json.dumps(result))
        return result["result"]
    while not store.check([key]):
        if should_stop():
            # Rank 0, asked to stop too, need not wait until this rank has read why.
            store.add(f"{key}/read", 1)
            raise errors.Interrupted(f"stopped while waiting for rank 0 ({name})")
        time.sleep(POLL_SECONDS)
    result = json.loads(store.get(key))
    store.add(f"{key}/read", 1)
    if "problem" in result:
        raise _unpack(result["problem"], 0, group)
    return result["result"]


def _await_readers(store: dist.Store, key: str, group: Group) -> None:
    # Rank 0 may host the store: it must not leave before its peers have read why.
    deadline = time.monotonic() + READERS_SECONDS
    while store.add(f"{key}/read", 0) < group.world_size - 1 and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def all_done(group: Group, name: str, problem: errors.SA3DistError | None, should_stop: Callable[[], bool]) -> None:
    """Wait, however long, until every rank has come here; raise on all ranks what any of them brought along."""
    if group.world_size == 1:
        if problem is not None:
            raise problem
        return
    store = dist.distributed_c10d._get_default_store()
    store.set(f"sa3dist/{name}/{group.dist_rank}", json.dumps(_pack(problem)))
    for dist_rank in range(group.world_size):
        key = f"sa3dist/{name}/{dist_rank}"
        while not store.check([key]):
            if should_stop():
                raise errors.Interrupted(f"stopped while waiting for rank {dist_rank} ({name})")
            time.sleep(POLL_SECONDS)
        found = json.loads(store.get(key))
        if found is not None:
            raise _unpack(found, dist_rank, group)


def _pack(problem: errors.SA3DistError | None) -> list[str] | None:
    return None if problem is None else [type(problem).__name__, str(problem)]


def _unpack(packed: list[str], dist_rank: int, group: Group) -> errors.SA3DistError:
    kind, message = packed
    where = (
        ""
        if group.world_size == 1 or dist_rank == group.dist_rank or kind != "EnvironmentFailure"
        else f"rank {dist_rank}: "
    )
    return getattr(errors, kind, errors.SA3DistError)(where + message)
