"""The processes of one run acting as one: rank, world size, reductions, and waiting without a time limit."""

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
from sa3dist.runtime import deepspeed_launch
from sa3dist.runtime.liveness import Liveness
from sa3dist.runtime.peers import END, default_store, pack, read, unpack
from sa3dist.runtime.signals import StopRequest

log = logging.getLogger(__name__)

# How often a waiting rank looks; it polls because preparation may outlast the time limit of any collective.
POLL_SECONDS = 0.05
# More than step_timeout, so that the watchdog, which knows which rank is missing, reports first.
GROUP_TIMEOUT_MARGIN_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Group:
    """This process among its peers. dist_rank 0 writes; ``device`` is where this process computes.

    deepspeed   the launcher's DeepSpeed configuration as read; None outside of that mode
    hosts       name of every rank's machine; empty for a process alone
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
        """Whether the ranks hold parts of the base, at DeepSpeed's stage 3, and exchange them within a pass."""
        zero = (self.deepspeed or {}).get("zero_optimization")
        return isinstance(zero, dict) and zero.get("stage") == 3

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

    def raise_first_error(self, problem: errors.SA3DistError | None) -> None:
        """Raise the first rank's problem on every rank, or return on all of them; what can be mended comes last.

        A rank that fails alone would leave its peers waiting in the next collective.
        """
        found = [unpack(packed) for packed in self.gather(pack(problem, self.dist_rank)) if packed is not None]
        for problem in sorted(found, key=lambda problem: isinstance(problem, errors.OutOfMemory)):
            raise problem


def connect(step_timeout_seconds: float) -> Group:
    """Join the process group the launcher prepared: accelerate, torchrun or plain python.

    step_timeout_seconds   a collective that waits for longer, and a margin, fails
    Raises ConfigError for a launcher's settings that Accelerate refuses, or that would do nothing here.

    Accelerate is made with mixed precision off whatever the launcher says; the step autocasts itself, so that adapters,
    gradients and moments stay float32 in every mode.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    for kind in ("FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in {"1", "true", "yes"}:
            raise errors.ConfigError(f"accelerate launch: {kind} divides nothing here; use DDP or DeepSpeed ZeRO")
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    if deepspeed_launch.asked_for():
        deepspeed_launch.prepare_environment(on_cpu)
        # Told of a CPU, Accelerate would ignore DeepSpeed silently.
        on_cpu = False
    patience = timedelta(seconds=step_timeout_seconds + GROUP_TIMEOUT_MARGIN_SECONDS)
    handlers = [InitProcessGroupKwargs(**backend_for(on_cpu), timeout=patience)]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        accelerator = Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=handlers)
    except ValueError as error:
        raise errors.ConfigError(f"accelerate launch: {' '.join(str(error).split())}") from error
    # It turns TF32 on where a launcher's file asks for dynamo, which compiles nothing here. Only then: an assignment of
    # what is there already shows in the keys of the compiler's cache.
    if torch.backends.cuda.matmul.allow_tf32 != tf32:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        # It would make transformers divide the text encoder as it loads.
        plugin.dschf = None
    # Under gloo Accelerate says "cpu:0", a name that file readers do not know.
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
    if dist.is_initialized():
        # Not accelerator.num_processes: it is 1 on every rank under DeepSpeed on CPU.
        group = Group(dist.get_rank(), dist.get_world_size(), device, plugin and plugin.deepspeed_config)
        return dataclasses.replace(group, hosts=tuple(group.gather(socket.gethostname())))
    return Group(0, 1, device)


def backend_for(on_cpu: bool) -> dict[str, str]:
    """``{"backend": "gloo"}`` where this machine's processes outnumber its GPUs and are all there are, else nothing.

    Accelerate lets them share the GPUs, but NCCL refuses two processes on one of them.
    """
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    # Of several machines one may have GPUs enough: it would wait for the others in another kind of group.
    if on_cpu or deepspeed_launch.asked_for() or here < everywhere or here <= (gpus := torch.cuda.device_count()):
        return {}
    log.warning("%d processes share %d GPU(s): gradients travel over gloo, through the host's memory", here, gpus)
    return {"backend": "gloo"}


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def main_process_first(group: Group, name: str, work: Callable[[], Any], stop: StopRequest | None) -> Any:
    """Run ``work`` on rank 0 while the others wait, however long; its JSON result reaches all ranks.

    name    unique per call within a run
    stop    ends the wait of a rank with Interrupted; None: wait to the end
    Raises, on a waiting rank, the reason for which rank 0 or any other has left (``peers.leave``).
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
    """Run ``work`` on every rank; return its result when it is done on all of them. The rest as above."""
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
        # A rank that waits for one that lives gets on; one that falls silent is noticed by the rank before it.
        group.liveness.progress()
        if stop is not None:
            stop.raise_if_requested(f"waiting for rank {awaited}")
        ended = read(store, END)
        # Set by a rank that has left after all have come here.
        if ended is not None and not store.check([key]):
            raise unpack(ended)
        time.sleep(POLL_SECONDS)
