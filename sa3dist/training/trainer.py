"""One rank's part of the training: gradients of its micro batches, the common step, failing together, saving."""

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
from typing import Any

import torch

from sa3dist.adapters import adapted_layers
from sa3dist.adapters.layers import cached_norms, uncached_norms
from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.data.batches.worker_shards import LanePlaces
from sa3dist.errors import CheckpointError, DataError, EnvironmentFailure, OutOfMemory, SA3DistError
from sa3dist.parallel import build, engine
from sa3dist.runtime.exit_status import translate
from sa3dist.runtime.liveness import AVERAGING
from sa3dist.runtime.process_group import Group, main_process_first
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import checkpoint, out_of_memory
from sa3dist.training.cuda_graphs import CudaGraphs
from sa3dist.training.loss import micro_batch_loss
from sa3dist.training.lr_schedule import Schedule
from sa3dist.training.rank_checks import check_ranks_agree, name_the_non_finite
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.shape_ladder import ShapeLadder

log = logging.getLogger(__name__)

COMPUTING = "computing gradients"

# What travels with the gradients: sums over the step's micro batches and ranks.
LOSS, LOSS_GEN, LOSS_CTX, STOP, TROUBLE, SILENT, REPEATED, SAVING = range(8)


class Trainer:
    """One rank's part of the loop: gradients of its micro batches, the common step, saving."""

    def __init__(self, base, parameters: dict[str, torch.nn.Parameter], settings, plan: RunPlan, group: Group) -> None:
        self.base = base
        self.layers = list(adapted_layers(base).values())
        self.settings = settings
        self.plan = plan
        self.group = group
        self.step = 0
        self.schedule = plan.schedule or Schedule(settings.learning_rate, plan.steps)
        forward = functools.partial(micro_batch_loss, base, settings=settings)
        self.engine = build.make(base, self.layers, parameters, forward, settings, plan, group, scalars=SAVING + 1)
        self.saver = checkpoint.Saver()
        self._stop = StopRequest()
        # Brings micro batches to few shapes; None where they are computed as they come.
        self.ladder: ShapeLadder | None = None
        self.graphs: CudaGraphs | None = None
        # Whether memory that runs out takes them along. Equal on all ranks, some of which may hold none any more.
        self.graphs_may_go = False
        # Where a stream without an index is; None where the step alone says it.
        self.places: LanePlaces | None = None
        self._clips: list[list[str]] = []
        # The step from which on blocks are recomputed because memory did not suffice.
        self.adapted_at: int | None = None

    def record_graphs(self, recorder) -> None:
        """Replay the passes of often seen shapes as CUDA graphs; for engines without collectives in the forward pass.

        recorder   see ``CudaGraphs``
        """
        self.graphs = CudaGraphs(self._pass, self._recordable_pass, self.engine.flat.gradient, recorder)
        self.graphs_may_go = True

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        missing = self.engine.parameters.keys() ^ saved.adapters.keys()
        if missing:
            raise CheckpointError(
                f"checkpoint of step {saved.step}: its layers differ from this run's, e.g. {min(missing)}"
            )
        self.engine.restore(saved.adapters, saved.moments, saved.step)
        self.step = saved.step

    def accumulate(self, batches: Iterator[MicroBatch]) -> tuple[float, list[tuple[list[str], torch.Tensor]]]:
        """Gradients of this rank's micro batches of one step.

        Returns the seconds spent waiting for data, and (clip keys, loss) per micro batch.
        """
        waited, losses = 0.0, []
        for left in reversed(range(self.plan.accumulation)):
            self.group.liveness.begin("waiting for data")
            asked = time.perf_counter()
            batch = self._fetch(batches)
            waited += time.perf_counter() - asked
            self.group.liveness.begin(COMPUTING)
            losses_of_batch = self._pass_alone if self.engine.separate else self.graphs or self._pass
            shaped = batch if self.ladder is None else self.ladder(batch)
            parts = torch.stack([loss.detach() for loss in losses_of_batch(shaped, last=left == 0)])
            self.engine.scalars[LOSS : LOSS_CTX + 1] += parts
            self.engine.scalars[SILENT] += batch.silent_crops
            self.engine.scalars[REPEATED] += batch.repeated_clips
            losses.append((batch.clips, parts[0]))
        return waited, losses

    def _pass(self, batch: MicroBatch, last: bool) -> engine.Losses:
        """Add the gradients of one micro batch; returns its losses."""
        losses = self.engine.losses(batch)
        self.engine.backward(losses[0] / self.plan.accumulation, last)
        return losses

    def _recordable_pass(self, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        """The same for a graph, which cannot know what other micro batches have found, nor send anything away."""
        with uncached_norms(self.layers):
            return tuple(loss.detach() for loss in self._pass(batch, last=False))

    def _pass_alone(self, batch: MicroBatch, last: bool) -> engine.Losses:
        """The same, but all ranks know that none has failed before any of them hands its gradients over.

        When memory did not suffice on one of them, all do the micro batch again, once.
        """
        while True:
            losses, gradients, problem = self._find_gradients(batch)
            if not self.group.any(problem is not None):
                self.engine.add(gradients, last)
                return losses
            del losses, gradients
            try:
                self.group.raise_first_error(problem)
            except OutOfMemory as shortage:
                self._recompute_from_here(shortage)

    def _find_gradients(self, batch: MicroBatch) -> tuple[engine.Losses | None, Any, SA3DistError | None]:
        try:
            losses = self.engine.losses(batch)
            return losses, self.engine.gradients(losses[0] / self.plan.accumulation), None
        except Exception as failure:
            return None, None, self._explain(failure)

    def _fetch(self, batches: Iterator[MicroBatch]) -> MicroBatch:
        """The next micro batch. All ranks fail here with collectives_in_forward when any has none."""
        batch, failure = None, None
        try:
            self.saver.check()
            with self._stop.breakable():
                batch = next(batches)
        except Exception as error:
            failure = error
        if self.engine.collectives_in_forward and self.group.any(failure is not None):
            self.group.raise_first_error(None if failure is None else self._explain(failure))
        if failure is not None:
            raise failure
        return batch

    def take_step(self, batches: Iterator[MicroBatch], stop: StopRequest) -> dict[str, float]:
        """One optimiser step over all ranks. Returns its figures, equal on every rank.

        Raises on every rank alike when any rank failed or the loss is not finite; the adapters then stay as they were.
        """
        self._stop = stop
        taken: list[MicroBatch] = []
        while (remedy := self._remedy()) is not None:
            # The same micro batches once more: neither remedy changes their gradients.
            again = itertools.chain(tuple(taken), out_of_memory.remembering(batches, taken))
            try:
                return self._attempt(again, stop)
            except OutOfMemory as problem:
                remedy(problem)
        return self._attempt(itertools.chain(taken, batches), stop)

    def _remedy(self) -> Callable[[OutOfMemory], None] | None:
        """What helps against too little memory in a step, as all ranks see it; None where nothing is left to try."""
        if self.engine.collectives_in_forward:
            return None
        if self.graphs_may_go:
            return self._drop_graphs
        if self.plan.adapt_memory and self.adapted_at is None:
            return self._recompute_from_here
        return None

    def _drop_graphs(self, problem: OutOfMemory) -> None:
        self.graphs_may_go = False
        self.graphs.drop()
        where = out_of_memory.place_of(problem)
        log.warning("step %d: out of memory on %s; cuda_graphs are off from here on", self.step + 1, where)

    def _attempt(self, batches: Iterator[MicroBatch], stop: StopRequest) -> dict[str, float]:
        liveness = self.group.liveness
        liveness.begin("beginning", step=self.step + 1)
        self.engine.zero()
        waited, losses, problem = 0.0, [], None
        try:
            # The norms are those of the step: found once, for all micro batches and recomputed blocks.
            with cached_norms(self.layers):
                waited, losses = self.accumulate(batches)
        except Exception as failure:
            if self.engine.collectives_in_forward:
                if isinstance(translate(failure), OutOfMemory):
                    raise self._explain(failure) from failure
                raise
            # Peers wait in the reduction below: join it first, fail afterwards, all together.
            problem = self._explain(failure)
            self.engine.scalars[TROUBLE].fill_(1)
        # Filled, not assigned: a number that is assigned is copied from the host, which waits for the device.
        self.engine.scalars[STOP].fill_(float(stop.requested()))
        self.engine.scalars[SAVING].fill_(float(self.saver.busy))
        liveness.begin(AVERAGING)
        grad_norm = self.engine.average()
        *figures, norm = torch.cat([self.engine.scalars, grad_norm[None]]).tolist()
        # As long as rank 0 has a save in flight no signal ends any rank.
        stop.saving = figures[SAVING] > 0
        if figures[TROUBLE]:
            self.group.raise_first_error(problem)
        count = self.plan.accumulation * self.group.world_size
        means = [value / count for value in figures[: LOSS_CTX + 1]]
        if not (math.isfinite(means[LOSS]) and math.isfinite(norm)):
            name_the_non_finite(self.group, self.step + 1, losses)
        rate = self.schedule.rate(self.step + 1)
        self.engine.step(rate)
        self.step += 1
        self._clips = [clips for clips, _ in losses]
        if self.places is not None:
            self.places.advance(repeated=round(figures[REPEATED]))
        return {
            "loss": means[LOSS],
            "loss_gen": means[LOSS_GEN],
            "loss_ctx": means[LOSS_CTX],
            "grad_norm": norm,
            "lr": rate,
            "stop": figures[STOP],
            "silent_crops": figures[SILENT],
            "data_wait_seconds": waited,
        }

    def clips_of_step(self) -> list[str]:
        """Keys of the clips all ranks trained on in the last step, in slot order; called on all ranks."""
        if self.places is None:
            return self.plan.clips_of_step(self.step)
        ranks = self.group.gather(self._clips)
        return [key for round_ in zip(*ranks, strict=True) for clips in round_ for key in clips]

    def _explain(self, failure: Exception) -> SA3DistError:
        """What the peers are told. The failure itself is let go: it holds the tensors of the step."""
        problem = translate(failure)
        if problem is None:
            problem = SA3DistError(f"{type(failure).__name__}: {failure}")
            log.error("step %d failed", self.step + 1, exc_info=failure)
        if isinstance(problem, DataError) and self.step > 0:
            # It was good enough to begin with: this run is not refused any more, and has state to continue from.
            problem, known = EnvironmentFailure(f"{problem}; state is as last saved"), problem
            problem.origin = known.origin
        if not isinstance(problem, OutOfMemory) or not (self.plan.adapt_memory or self.graphs_may_go):
            return problem
        computing = self.group.liveness.doing == COMPUTING
        if computing and self.graphs_may_go:
            return problem
        if not self.plan.adapt_memory:
            # The stream of micro batches has ended with it: nothing is left to do the step again with.
            return EnvironmentFailure(str(problem))
        if self.base.gradient_checkpointing or not computing:
            return out_of_memory.beyond_recomputing(problem, self.step + 1, self.plan.micro_batch)
        if self.engine.collectives_in_forward and not self.engine.separate:
            return out_of_memory.within_an_exchange(problem, self.step + 1)
        return problem

    def _recompute_from_here(self, problem: OutOfMemory) -> None:
        self.adapted_at = self.step + 1
        out_of_memory.recompute_from(self.adapted_at, self.base, self.group.device, problem)

    def save(self, output_dir: Path, stop: StopRequest, wait: bool, before: Callable[[], None] = lambda: None) -> None:
        """Copy the state and publish it on rank 0; first check that the ranks hold equal, finite adapters.

        wait     return, on every rank, when it is published; otherwise rank 0 writes it while the training goes on
        before   run ahead of the publication, beside the training likewise
        """
        self.group.liveness.begin("saving")
        # On all ranks: some modes gather it.
        adapters, moments = self.engine.adapters(), self.engine.moments()
        check_ranks_agree(self.group, self.step, adapters)
        saved = checkpoint.Checkpoint(adapters, moments, self._state())

        def publish() -> None:
            before()
            checkpoint.save(output_dir, saved, self.settings.keep_checkpoints)

        def done() -> None:
            stop.saving = False

        stop.saving = True
        if not wait:
            if self.group.is_main:
                self.saver.start(publish, done)
            return

        def publish_now() -> None:
            self.saver.start(publish, done)
            self.saver.wait()

        try:
            main_process_first(self.group, f"save-{self.step}", publish_now, stop=None)
        finally:
            stop.saving = False

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors; called on all ranks."""
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
        if self.places is not None:
            cursors = self.group.gather(list(self.places.cursors))
            state["stream"] = {"cursors": cursors, "repeated": self.places.repeated}
        return state

    def description(self) -> dict[str, Any]:
        """What config.json says of the run as it is now."""
        memory = {"gradient_checkpointing": self.base.gradient_checkpointing, "out_of_memory_at_step": self.adapted_at}
        return {**self.plan.description, **memory, "step": self.step}
