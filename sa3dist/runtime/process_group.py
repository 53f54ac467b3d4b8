"""The processes of one run: rank, world size, reductions, and waiting without a time limit."""

import dataclasses
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sa3dist import errors
from sa3dist.runtime import deepspeed_launch, launcher
from sa3dist.runtime.liveness import Liveness
from sa3dist.runtime.peers import END, default_store, pack, read, unpack
from sa3dist.runtime.signals import StopRequest

log = logging.getLogger(__name__)

# Polling interval of waiting ranks. They poll because preparation may outlast the time limit of any collective.
POLL_SECONDS = 0.05
# Added to step_timeout: the watchdog, which knows the missing rank, then reports first.
GROUP_TIMEOUT_MARGIN_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Group:
    """This process among its peers. dist_rank 0 writes; ``device`` is where this process computes.

    deepspeed   the launcher's DeepSpeed configuration as read; None without DeepSpeed
    hosts       machine name of every rank; empty for a single process
    liveness    what this process is doing, shown to the others
    """

    dist_rank: int
    world_size: int
    device: torch.device
    deepspeed: dict[str, Any] | None = None
    hosts: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    liveness: Liveness = dataclasses.field(default_factory=Liveness, kw_only=True, compare=False)

    @property
    def is_main(self) -> bool:
        return self.dist_rank == 0

    @property
    def divides_model(self) -> bool:
        """Whether each rank holds only a part of the base (DeepSpeed stage 3) and exchanges it within a pass."""
        zero = (self.deepspeed or {}).get("zero_optimization")
        return isinstance(zero, dict) and zero.get("stage") == 3

    def sum_(self, flat: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(flat)
        return flat

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)

    def any(self, mine: bool) -> bool:
        """Whether ``mine`` is true on any process."""
        return self.sum_(torch.tensor(float(mine), device=self.device)).item() > 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def raise_first_error(self, problem: errors.SA3DistError | None) -> None:
        """Raise the first rank's problem on every rank, or return on all. OutOfMemory, maybe recoverable, comes last.

        A rank that fails alone would leave its peers waiting in the next collective.
        """
        found = [unpack(packed) for packed in self.gather(pack(problem, self.dist_rank)) if packed is not None]
        for problem in sorted(found, key=lambda problem: isinstance(problem, errors.OutOfMemory)):
            raise problem


def connect(step_timeout_seconds: float) -> Group:
    """Join the process group of the launcher: accelerate, torchrun or plain python.

    step_timeout_seconds   a collective that waits for longer than this plus a margin fails
    Raises ConfigError for launcher settings that Accelerate refuses, or that have no effect here.

    Accelerate always gets mixed precision off, whatever the launcher says: the step autocasts itself, so that adapters,
    gradients and moments stay float32 in every mode.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    for kind in ("FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in {"1", "true", "yes"}:
            raise errors.ConfigError(f"accelerate launch: {kind} divides nothing here; use DDP or DeepSpeed ZeRO")
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    if deepspeed_launch.asked_for():
        deepspeed_launch.prepare_environment(on_cpu)
        # Told to use a CPU, Accelerate would silently ignore DeepSpeed.
        on_cpu = False
    patience = timedelta(seconds=step_timeout_seconds + GROUP_TIMEOUT_MARGIN_SECONDS)
    handlers = [InitProcessGroupKwargs(**backend_for(on_cpu), timeout=patience)]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        accelerator = Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=handlers)
    except ValueError as error:
        raise errors.ConfigError(f"accelerate launch: {' '.join(str(error).split())}") from error
    # Accelerate turns TF32 on if the launcher's file asks for dynamo, which compiles nothing here. Undo it, but only
    # then: even assigning an equal value changes the keys of the compiler's cache.
    if torch.backends.cuda.matmul.allow_tf32 != tf32:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        # Otherwise transformers would partition the text encoder while loading it.
        plugin.dschf = None
    # With gloo Accelerate says "cpu:0", which readers of tensor files do not accept.
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
    if dist.is_initialized():
        # Not accelerator.num_processes, which is 1 on every rank under DeepSpeed on CPU.
        group = Group(dist.get_rank(), dist.get_world_size(), device, plugin and plugin.deepspeed_config)
        launcher.check_joined(group.world_size)
        return dataclasses.replace(group, hosts=tuple(group.gather(socket.gethostname())))
    launcher.check_joined(1)
    return Group(0, 1, device)


def backend_for(on_cpu: bool) -> dict[str, str]:
    """``{"backend": "gloo"}`` if the only machine has more processes than GPUs, else nothing.

    Accelerate lets processes share a GPU, but NCCL refuses that.
    """
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    # With several machines, one may have enough GPUs: it would wait for the others in a group of another backend.
    if on_cpu or deepspeed_launch.asked_for() or here < everywhere or here <= (gpus := torch.cuda.device_count()):
        return {}
    log.warning("%d processes share %d GPU(s): gradients travel over gloo, through the host's memory", here, gpus)
    return {"backend": "gloo"}


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def main_process_first(group: Group, name: str, work: Callable[[], Any], stop: StopRequest | None) -> Any:
    """Run ``work`` on rank 0 while the others wait, however long; all ranks get its JSON result.

    name    unique per call within a run
    stop    ends a waiting rank with Interrupted; None: wait to the end
    Raises, on a waiting rank, the reason for which rank 0 or any other rank has left (``peers.leave``).
    """
    if group.world_size == 1:
        return work()
    store, key = default_store(), f"sa3dist/{name}"
    if group.is_main:
        result = work()
        store.set(key, json.dumps(result))
        return result
    _wait_for(store, key, 0, group, stop)
    return json.loads(store.get(key))


def run_on_all_ranks(group: Group, name: str, work: Callable[[], Any], stop: StopRequest | None) -> Any:
    """Run ``work`` on every rank; return its result when all are done. Otherwise as ``main_process_first``."""
    result = work()
    if group.world_size > 1:
        store = default_store()
        store.set(f"sa3dist/{name}/{group.dist_rank}", "1")
        for dist_rank in range(group.world_size):
            _wait_for(store, f"sa3dist/{name}/{dist_rank}", dist_rank, group, stop)
    return result


def _wait_for(store: dist.Store, key: str, awaited: int, group: Group, stop: StopRequest | None) -> None:
    """Return when ``key`` is set. Raises when asked to stop, and when any rank has left."""
    while not store.check([key]):
        # Waiting counts as progress; if the awaited rank falls silent, the rank before it notices.
        group.liveness.progress()
        if stop is not None:
            stop.raise_if_requested(f"waiting for rank {awaited}")
        ended = read(store, END)
        # Set by a rank that left after all ranks had reached this point.
        if ended is not None and not store.check([key]):
            raise unpack(ended)
        time.sleep(POLL_SECONDS)
