"""One rank's part of the training: gradients of its micro batches, the common optimiser step, saving."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sa3dist.adapters import adapted_layers
from sa3dist.adapters.layers import cached_norms, uncached_norms
from sa3dist.errors import DataError, EnvironmentFailure, OutOfMemory, SA3DistError
from sa3dist.parallel import build
from sa3dist.runtime.exit_status import translate
from sa3dist.runtime.liveness import AVERAGING
from sa3dist.runtime.process_group import Group, main_process_first
from sa3dist.training import checkpoint
from sa3dist.training.cuda_graphs import CudaGraphs
from sa3dist.training.loss import BY_TIME, LOSSES, micro_batch_loss
from sa3dist.training.lr_schedule import Schedule
from sa3dist.training.memory import ending
from sa3dist.training.rank_checks import check_ranks_agree, name_the_non_finite
from sa3dist.training.step_sums import SUMS, must_skip, start_copy_to_host

if TYPE_CHECKING:
    from sa3dist.data.batches.micro_batch import MicroBatch
    from sa3dist.data.batches.worker_shards import RankCursors
    from sa3dist.model.base import Base
    from sa3dist.runtime.signals import StopRequest
    from sa3dist.settings import Settings
    from sa3dist.training.graph_recorder import Recorder, Tensors
    from sa3dist.training.run_plan import RunPlan
    from sa3dist.training.shape_ladder import ShapeLadder

log = logging.getLogger(__name__)

COMPUTING = "computing gradients"


class Trainer:
    """One rank's part of the training loop.

    parameters   the trained tensors of the adapters attached to ``base``, by their name in a file
    cursors      positions in a stream without an index; None where the step number alone gives the position
    """

    def __init__(
        self,
        base: Base,
        parameters: dict[str, torch.nn.Parameter],
        settings: Settings,
        plan: RunPlan,
        group: Group,
        cursors: RankCursors | None = None,
    ) -> None:
        self.base = base
        self.layers = list(adapted_layers(base).values())
        self.settings = settings
        self.plan = plan
        self.group = group
        self.step = 0
        self.schedule = plan.schedule or Schedule(settings.learning_rate, plan.steps)
        forward = functools.partial(micro_batch_loss, base, settings=settings)
        self.engine = build.make(base, self.layers, parameters, forward, settings, plan, group, len(SUMS))
        self.saver = checkpoint.Saver()
        # Pads micro batches to few shapes; None = shapes stay as they come.
        self.ladder: ShapeLadder | None = None
        self.graphs: CudaGraphs | None = None
        # Whether a step that runs out of memory is repeated without graphs; equal on all ranks.
        self.may_drop_graphs = False
        self.cursors = cursors
        self._clips: list[list[str]] = []

    def record_graphs(self, recorder: Recorder, exact: bool = False) -> None:
        """Replay passes of frequent shapes; not for collectives in the forward pass. exact: only with equal bits."""
        self.graphs = CudaGraphs(self._pass, self._recordable_pass, self.engine.gradient, recorder, exact)
        self.may_drop_graphs = True

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint. Raises CheckpointError when its layers differ, or AdamW moments are missing."""
        saved.require(self.engine.parameters)
        self.engine.restore(saved.adapters, saved.moments, saved.step)
        self.step = saved.step

    def take_step(self, batches: Iterator[MicroBatch], stop: StopRequest) -> dict[str, float]:
        """One optimiser step over all ranks.

        Returns mean losses, gradient norm, learning rate, and the sums that loop and metrics need. All but
        ``data_wait_seconds`` are equal on every rank.
        Raises on every rank when any rank failed or the loss is not finite; the adapters are then unchanged.
        """
        if not self.may_drop_graphs:
            return self._step(batches, stop)
        first, again = itertools.tee(batches)
        try:
            return self._step(first, stop)
        except OutOfMemory as problem:
            self.may_drop_graphs = False
            self.graphs.drop()
            where = self.step + 1, *problem.origin
            log.warning("step %d: out of memory on rank %d on %s; cuda_graphs are off from here on", *where)
        # The same micro batches again: their gradients are the same without graphs.
        return self._step(again, stop)

    def _step(self, batches: Iterator[MicroBatch], stop: StopRequest) -> dict[str, float]:
        self.group.liveness.begin("beginning", step=self.step + 1)
        self.engine.zero()
        waited, losses, problem = self._accumulate(batches, stop)
        rate = self.schedule.rate(self.step + 1)
        sums, grad_norm = self._average(stop, rate, failed=problem is not None)
        if sums["failed"]:
            self.group.raise_first_error(problem)
        means = {name: sums[name] / (self.plan.accumulation * self.group.world_size) for name in LOSSES}
        if not (math.isfinite(means["loss"]) and math.isfinite(grad_norm)):
            name_the_non_finite(self.group, self.step + 1, losses)
        if not self.engine.steps_ahead:
            self.engine.step(rate)
        self.step += 1
        self._clips = [clips for clips, _ in losses]
        if self.cursors is not None:
            self.cursors.advance(repeated=round(sums["repeated_clips"]))
        counts = {name: sums[name] for name in ("silent_crops", "stop", *BY_TIME)}
        return {**means, "grad_norm": grad_norm, "lr": rate, **counts, "data_wait_seconds": waited}

    def _accumulate(
        self, batches: Iterator[MicroBatch], stop: StopRequest
    ) -> tuple[float, list[tuple[list[str], torch.Tensor]], SA3DistError | None]:
        """Add up gradients and losses of this rank's micro batches of one step.

        Returns the seconds spent waiting for data, (clip keys, loss) per micro batch, and the error, if any.
        """
        waited, losses = 0.0, []
        try:
            # The norms of adapted weights change only with the step: all micro batches and recomputed blocks share
            # them.
            with cached_norms(self.layers):
                for left in reversed(range(self.plan.accumulation)):
                    asked = time.perf_counter()
                    batch = self._next(batches, stop)
                    waited += time.perf_counter() - asked
                    losses.append((batch.clips, self._gradients(batch, last=left == 0)))
        except Exception as failure:
            problem = self._explain(failure)
            if self.engine.collectives_in_forward:
                raise problem from None
            # The peers wait in the reduction: this rank joins it first, then all ranks fail together.
            return waited, losses, problem
        return waited, losses, None

    def _next(self, batches: Iterator[MicroBatch], stop: StopRequest) -> MicroBatch:
        """The next micro batch. With collectives in the forward pass all ranks fail here when any rank has none."""
        self.group.liveness.begin("waiting for data")
        batch, failure = None, None
        try:
            self.saver.check()
            with stop.breakable():
                batch = next(batches)
        except Exception as error:
            failure = error
        if self.engine.collectives_in_forward and self.group.any(failure is not None):
            self.group.raise_first_error(None if failure is None else self._explain(failure))
        if failure is not None:
            raise failure
        return batch

    def _gradients(self, batch: MicroBatch, last: bool) -> torch.Tensor:
        """Add the gradients and sums of one micro batch; returns its loss. last: this rank's last one of the step."""
        self.group.liveness.begin(COMPUTING)
        run_pass = self.graphs or self._pass
        losses = torch.stack(run_pass(batch if self.ladder is None else self.ladder(batch), last))
        self.engine.scalars[: len(losses)] += losses
        self._add_to_sums(silent_crops=batch.silent_crops, repeated_clips=batch.repeated_clips)
        return losses[LOSSES.index("loss")]

    def _pass(self, batch: MicroBatch, last: bool) -> Tensors:
        return self._forward_backward(batch, functools.partial(self.engine.backward, last=last))

    def _forward_backward(self, batch: MicroBatch, backward: Callable[[torch.Tensor], None]) -> Tensors:
        """Forward and backward pass of one micro batch: adds its gradients, returns its ``LOSSES`` and ``BY_TIME``."""
        losses = self.engine.losses(batch)
        backward(losses["loss"] / self.plan.accumulation)
        return tuple(losses[name].detach() for name in (*LOSSES, *BY_TIME))

    def _recordable_pass(self, batch: MicroBatch) -> Tensors:
        """The same pass for a graph: no norms cached by other micro batches, nothing sent to other ranks."""
        with uncached_norms(self.layers):
            return self._forward_backward(batch, self.engine.add_gradients)

    def _average(self, stop: StopRequest, rate: float, failed: bool) -> tuple[dict[str, float], float]:
        """Average the gradients; step too, where the engine steps ahead. Returns the sums over ranks and the norm."""
        self._add_to_sums(failed=failed, stop=stop.requested(), saving=self.saver.busy)
        self.group.liveness.begin(AVERAGING)
        norm = self.engine.average()
        read = start_copy_to_host(torch.cat([self.engine.scalars, norm[None]]))
        if self.engine.steps_ahead and not failed:
            # Launched before the host has read the sums: the device reads them itself and skips a bad step.
            self.engine.step(rate, must_skip(self.engine.scalars, norm))
            if self.step + 1 < self.plan.steps:
                self.engine.form_ahead()
        # The only place in a step where the host waits for the device.
        *summed, grad_norm = read()
        sums = dict(zip(SUMS, summed, strict=True))
        # While rank 0 has a save in flight, a signal ends no rank.
        stop.saving = sums["saving"] > 0
        return sums, grad_norm

    def _add_to_sums(self, **values: float) -> None:
        for name, value in values.items():
            # In place: assigning a number copies it from the host, which would wait for the device.
            self.engine.scalars[SUMS.index(name)].add_(float(value))

    def _explain(self, failure: Exception) -> SA3DistError:
        """The error that the peers are told. Does not keep ``failure``, which holds the tensors of the step."""
        problem = translate(failure)
        if problem is None:
            problem = SA3DistError(f"{type(failure).__name__}: {failure}")
            log.error("step %d failed", self.step + 1, exc_info=failure)
        if isinstance(problem, DataError) and self.step > 0:
            # The data passed the checks at the start, and there is state to continue from: not the user's mistake any
            # more.
            problem, known = EnvironmentFailure(f"{problem}; state is as last saved"), problem
            problem.origin = known.origin
        if not isinstance(problem, OutOfMemory):
            return problem
        computing = self.group.liveness.doing == COMPUTING
        if self.may_drop_graphs:
            # If encoding a clip ran out of memory, the stream of micro batches has ended: the step cannot be repeated.
            return problem if computing else EnvironmentFailure(str(problem))
        return ending(problem, self.step + 1, self.plan, computing and not self.base.gradient_checkpointing)

    def clips_of_step(self) -> list[str]:
        """Keys of the clips of all ranks in the last step, in slot order; called on all ranks."""
        if self.cursors is None:
            return self.plan.clips_of_step(self.step)
        ranks = self.group.gather(self._clips)
        return [key for round_ in zip(*ranks, strict=True) for clips in round_ for key in clips]

    def save(self, output_dir: Path, stop: StopRequest, wait: bool, before: Callable[[], None] = lambda: None) -> None:
        """Check that the ranks hold equal, finite adapters, copy the state, and publish it on rank 0.

        wait     return, on every rank, once it is published; otherwise rank 0 writes it in the background
        before   called just before the publication, in the same thread
        """
        self.group.liveness.begin("saving")
        # On all ranks: some engines gather it.
        adapters, moments = self.engine.adapters(), self.engine.moments()
        check_ranks_agree(self.group, self.step, adapters)
        saved = checkpoint.Checkpoint(adapters, moments, self._state())

        def publish() -> None:
            before()
            checkpoint.save(output_dir, saved, self.settings.keep_checkpoints)

        def start() -> None:
            self.saver.start(publish, functools.partial(setattr, stop, "saving", False))
            if wait:
                self.saver.wait()

        stop.saving = True
        if wait:
            try:
                main_process_first(self.group, f"save-{self.step}", start, stop=None)
            finally:
                stop.saving = False
        elif self.group.is_main:
            start()

    def _state(self) -> dict[str, Any]:
        """The JSON part of a checkpoint; called on all ranks."""
        plan = self.plan
        state = {
            "step": self.step,
            "next_slot": self.step * plan.global_batch,
            "global_batch": plan.global_batch,
            "world_size": self.group.world_size,
            "identity": plan.identity,
            "schedule": dataclasses.asdict(self.schedule),
            "weight_decay": self.settings.weight_decay,
            "torch": torch.__version__,
            "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "description": self.description(),
        }
        if self.cursors is not None:
            cursors = self.group.gather(list(self.cursors.cursors))
            state["stream"] = {"cursors": cursors, "repeated": self.cursors.repeated}
        return state

    def description(self) -> dict[str, Any]:
        """The content of config.json at the current step."""
        recomputed = self.base.gradient_checkpointing
        memory = {"gradient_checkpointing": recomputed, "out_of_memory_at_step": self.plan.out_of_memory_at_step}
        return {**self.plan.description, **memory, **self.plan.position(self.step)}
