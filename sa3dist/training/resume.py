"""Continuing a run: which checkpoint, whether it belongs to this run, and how its work divides over the ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sa3dist_kernels import ADAPTER_TYPES

from sa3dist.adapters.svd_bases import METHOD
from sa3dist.data.remote.fetch import redacted
from sa3dist.errors import CheckpointError, counted
from sa3dist.formats import remove_stale
from sa3dist.runtime.launcher import requeued_job
from sa3dist.runtime.process_group import Group, main_process_first, run_on_all_ranks
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import checkpoint, lr_schedule
from sa3dist.training.lr_schedule import Schedule

if TYPE_CHECKING:
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)

# Temporary names of files that other threads and processes may be writing at this moment.
BESIDE = (".report.html.", ".heartbeat.json.", ".status.json.", ".run.lock")
# The value of a checkpoint's identity that says from which adapter file its run started.
WARM_START = "lora_checkpoint_sha256"
# Values of checkpoints that were saved before a key existed.
BEFORE = {"singular_bases": "found as earlier versions did", "held_out": "none"}


def identity(settings: Settings, **measured: Any) -> dict[str, Any]:
    """JSON values by name that a checkpoint must share with the run to be continued.

    measured   values not in the settings: digests of base, dataset and warm start, lora_config, crop_frames
    """
    bases = {"singular_bases": METHOD} if ADAPTER_TYPES[settings.adapter_type].xs else {}
    return {**measured, **bases, **settings.identity()}


def find(settings: Settings, group: Group, stop: StopRequest) -> checkpoint.Checkpoint | None:
    """The checkpoint that a run continues from, checked as far as settings alone allow; None for a fresh run.

    Raises ConfigError or CheckpointError, on every rank: the checkpoint cannot be read, other settings decided what it
    trained, or the ranks cannot share its global batch (a fresh run's: that of the settings).
    """
    saved = find_checkpoint(settings, group, stop)
    if saved is not None:
        _compare(saved, settings.identity(), settings.identity(), settings)
        check_changes(saved, settings)
    rounds = accumulation_of(saved, settings, group.world_size)
    configured = settings.gradient_accumulation_steps, settings.global_batch_size
    if saved is not None and (rounds != configured[0] or configured[1] not in (None, saved.state["global_batch"])):
        found = counted(saved.state["global_batch"], "clip"), counted(rounds, "micro batch", "micro batches")
        log.info("resuming with the checkpoint's %s per step: %s per process", *found)
    return saved


def find_checkpoint(settings: Settings, group: Group, stop: StopRequest) -> checkpoint.Checkpoint | None:
    """The checkpoint ``settings.resume`` asks for, read by every rank; None when there is none to continue.

    A job that its scheduler has requeued continues its own, whatever ``resume`` says: it would never end otherwise.
    Raises CheckpointError on every rank when any rank cannot read it.
    """
    read: list[checkpoint.Checkpoint] = []

    def find() -> str | None:
        found = checkpoint.find(settings.output_dir, settings.resume, requeued_job())
        if found is None:
            return None
        read.append(found)
        return str(found.directory)

    def load() -> checkpoint.Checkpoint:
        # The rank that searched has already read and verified it.
        return read.pop() if read else checkpoint.load(Path(path))

    path = main_process_first(group, "find-checkpoint", find, stop)
    if path is None:
        return None
    return run_on_all_ranks(group, "load-checkpoint", load, stop)


def warm_start_of(saved: checkpoint.Checkpoint, settings: Settings) -> str | None:
    """Digest of the adapter file that the checkpoint's run started from; None without one, or if it has to be read.

    A run that continues does not need the file, whose address may have expired: the same address, but for its user and
    its query, which a new signature changes, stands for the same file. Raises CheckpointError if one run has such a
    file and the other has not.
    """
    digest = saved.state["identity"].get(WARM_START)
    address = saved.state.get("description", {}).get("settings", {}).get("lora_checkpoint_url")
    asked = redacted(settings.lora_checkpoint_url) if settings.lora_checkpoint_url else None
    if (digest is None) != (asked is None):
        _refuse(settings, "lora_checkpoint_url", address or digest, asked)
    return digest if asked == address else None


def check_identity(saved: checkpoint.Checkpoint, identity: dict[str, Any], settings: Settings) -> None:
    """Raises CheckpointError naming the first value in which the run and its checkpoint differ.

    A checkpoint without a setting's value is older than the setting: it was made with what is now the default. One with
    a value that this run does not know is newer.
    """
    _compare(saved, identity, [*identity, *saved.state["identity"]], settings)


def _compare(saved: checkpoint.Checkpoint, identity: dict[str, Any], names: Iterable[str], settings: Settings) -> None:
    before = BEFORE | {name: type(settings).model_fields[name].default for name in settings.identity()}
    for name in names:
        found, value = (values.get(name, before.get(name)) for values in (saved.state["identity"], identity))
        if found != value:
            _refuse(settings, name, found, value)


def _refuse(settings: Settings, name: str, found: Any, value: Any) -> NoReturn:
    raise CheckpointError(
        f"{settings.output_dir}: holds a checkpoint with {name} {found!r}, this run has {value!r}; use another "
        f"output_dir, or resume=never to start over"
    )


def accumulation_of(saved: checkpoint.Checkpoint | None, settings: Settings, world_size: int) -> int:
    """Micro batches per rank and step. A checkpoint's global batch overrides the configuration.

    Raises CheckpointError, naming the process counts that work, when that batch does not divide.
    """
    if saved is None:
        return settings.accumulation(world_size)
    global_batch, micro_batch = saved.state["global_batch"], saved.state["identity"]["batch_size"]
    rounds, rest = divmod(global_batch, micro_batch * world_size)
    if rest:
        workable = [n for n in range(1, global_batch // micro_batch + 1) if global_batch % (micro_batch * n) == 0]
        raise CheckpointError(
            f"resume: the checkpoint trains {counted(global_batch, 'clip')} per step in micro batches of "
            f"{micro_batch}, which {counted(world_size, 'process', 'processes')} cannot share evenly; use "
            f"{' or '.join(map(str, workable))} process{'es' * (workable != [1])}"
        )
    return rounds


def check_changes(saved: checkpoint.Checkpoint, settings: Settings) -> None:
    """Warn of changes that a continued run may have, and refuse the others."""
    if saved.step > settings.number_of_steps:
        raise CheckpointError(
            f"{settings.output_dir}: has trained {counted(saved.step, 'step')} already, number_of_steps is "
            f"{settings.number_of_steps}; raise it, use another output_dir, or resume=never to start over"
        )
    was, now = Schedule(**saved.state["schedule"]), lr_schedule.of_settings(settings)
    if not now.same_rates(was):
        log.warning("continuing with learning rate %s; it was %s", now, was)
    if saved.state["weight_decay"] != settings.weight_decay:
        log.warning("continuing with weight_decay %g, it was %g", settings.weight_decay, saved.state["weight_decay"])


def out_of_memory_at(saved: checkpoint.Checkpoint | None, settings: Settings, noted: int | None) -> int | None:
    """The step at which an earlier start ran out of memory, with ``on_oom: adapt``: blocks are then recomputed.

    noted   from the status.json of the previous start, which may have saved no checkpoint since
    """
    if settings.on_oom != "adapt":
        return None
    known = saved.state.get("description", {}).get("out_of_memory_at_step") if saved else None
    if noted is not None:
        log.warning("step %d did not fit into memory; recomputing blocks from here on", noted)
    return known if noted is None else noted


def set_aside(output_dir: Path, step: int, group: Group, stop: StopRequest) -> None:
    """On rank 0, move checkpoints of later steps than ``step`` away: this run takes another course.

    Also deletes temporary files of a killed start.
    """

    def work() -> None:
        checkpoint.set_aside(output_dir, step)
        for path in (*output_dir.glob(".*.tmp"), *output_dir.glob("previews/step-*/.*.tmp")):
            if path.is_file() and not path.name.startswith(BESIDE):
                path.unlink()
        remove_stale(output_dir.glob(f"{BESIDE[0]}*.tmp"))

    main_process_first(group, "set-aside", work, stop)
