"""Evaluate the loss on held-out clips during training, with the same crops, noise and times as for the base."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from typing import Any

import torch

from sa3dist.adapters import set_strength
from sa3dist.adapters.file import write_adapter_file
from sa3dist.adapters.header import extras, header
from sa3dist.adapters.layers import cached_norms
from sa3dist.data.batches.batch_source import BatchSource
from sa3dist.errors import counted
from sa3dist.formats import BEST_ADAPTER_NAME, write_json
from sa3dist.model.compiled import uncompiled
from sa3dist.runtime import lease
from sa3dist.runtime.process_group import main_process_first, run_on_all_ranks
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.observers import Observation, Observer
from sa3dist.training.trainer import Trainer
from sa3dist.validation.fixed_set import TIMES, FixedSet
from sa3dist.validation.history import BEST_NAME, GAIN, LOSS, SET, History

log = logging.getLogger(__name__)


def of_run(trainer: Trainer, source: BatchSource) -> Validation | None:
    """The run's validation; None if its settings do not enable it."""
    return Validation(trainer, source) if source.held_out and trainer.settings.validation_every else None


class Validation(Observer):
    """Evaluates the fixed set every ``validation_every`` steps, publishes the best adapter, and stops early.

    Every crop and time is one forward pass of one clip on one rank, with the adapters as in training passes. So the
    results do not depend on the number of ranks, and no pass needs more memory than a training step.
    """

    name = "validation"

    def __init__(self, trainer: Trainer, source: BatchSource) -> None:
        self.trainer, self.settings, self.group = trainer, trainer.settings, trainer.group
        self.set = FixedSet(source)
        self.history = History()

    def begin(self, stop: StopRequest) -> Observation | None:
        step = self.trainer.step
        values = main_process_first(self.group, "validation-history", self._read, stop=None)
        self.history = History(values["base"], [tuple(pair) for pair in values["losses"]], values["best"])
        if self.history.base is None:
            return self._evaluate(0, stop)
        # A signal may have prevented the evaluation of this step.
        if step and self._due(step) and not self.history.has(step):
            return self._evaluate(step, stop)
        return Observation(step, 0.0, end=self._end())

    def after_step(self, step: int, stop: StopRequest) -> Observation | None:
        return self._evaluate(step, stop) if self._due(step) else None

    def _due(self, step: int) -> bool:
        return step % self.settings.validation_every == 0 or step == self.trainer.plan.steps

    def _read(self) -> dict[str, Any]:
        """On rank 0: read the history of this run, and remove the best adapter of another run."""
        output_dir, step = self.settings.output_dir, self.trainer.step
        history = History.read(output_dir, self.set.digest)
        of_this_run = history.best is not None and step > 0
        if self.settings.resume not in ("auto", "never"):
            # Resumed from a named checkpoint: a later best adapter belongs to a different continuation.
            of_this_run = of_this_run and history.best[0] <= step
        if not of_this_run:
            history.best = None
            for name in (BEST_NAME, BEST_ADAPTER_NAME):
                (output_dir / name).unlink(missing_ok=True)
        return dataclasses.asdict(history)

    def _evaluate(self, step: int, stop: StopRequest) -> Observation:
        """Evaluate after ``step``; 0 = the base, without adapters."""
        begin = time.perf_counter()
        losses = self._mean_losses(step, stop)
        row, end = {}, ""
        if losses is not None:
            row = self._row(step, losses)
            end = self._end() if step else ""
        seconds = time.perf_counter() - begin
        return Observation(step, seconds, {"validation_seconds": seconds}, row, end=end, long=True)

    def _row(self, step: int, losses: list[float]) -> dict[str, Any]:
        """Record an evaluation, publish the adapters if they are the best, and return the metrics row."""
        history = self.history
        mean = math.fsum(losses) / len(losses)
        # Infinite, so that it is worse than any number.
        loss = mean if math.isfinite(mean) else math.inf
        if step == 0:
            history.base = loss
        else:
            history.losses.append((step, loss))
            if self.settings.keep_best and (history.best is None or loss < history.best[1]):
                self._publish(step, loss)
        values = {f"{LOSS}_{t}": value for t, value in zip(TIMES, losses, strict=True)} | {LOSS: mean}
        if history.base is not None:
            values[GAIN] = mean - history.base
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return row | ({SET: self.set.digest} if step == 0 else {})

    def _end(self) -> str:
        """Why training ends now; empty if it continues."""
        patience, history = self.settings.early_stop, self.history
        if not patience or history.since_best < patience:
            return ""
        step, loss = min(history.losses, key=lambda pair: pair[1])
        evaluations = counted(history.since_best, "evaluation")
        return f"early_stop: {evaluations} without a lower validation loss than {loss:.4f}, after step {step}"

    def _publish(self, step: int, loss: float) -> None:
        """Write the current adapters as the best, on rank 0; call on all ranks."""
        trainer, output_dir = self.trainer, self.settings.output_dir
        tensors = trainer.engine.adapters()
        self.history.best = step, loss
        if self.group.is_main:
            lease.end_if_over()
            description = trainer.description()
            metadata = header(description), extras(description)
            write_adapter_file(output_dir / BEST_ADAPTER_NAME, trainer.base.adapter_config, tensors, *metadata)
            write_json(output_dir / BEST_NAME, {"step": step, LOSS: loss})

    def _mean_losses(self, step: int, stop: StopRequest) -> list[float] | None:
        """Mean loss over the set at each time, equal on all ranks; None if any rank was asked to stop."""
        group, crops = self.group, self.set.crops
        group.liveness.begin("validating")
        mine = self.set.of_ranks(group.world_size)[group.dist_rank :: group.world_size]
        losses = self._losses(mine, step == 0, stop)
        # Wait for the slowest rank first: the timeout of a collective may be too short.
        run_on_all_ranks(group, f"validation-{step}", lambda: None, stop=None)
        by_rank = group.gather(losses)
        if any(rank_losses is None for rank_losses in by_rank):
            return None
        # Back in the order of crops, without the repeats at the end.
        by_crop = [crop_losses for crops_of_ranks in zip(*by_rank, strict=True) for crop_losses in crops_of_ranks]
        return [math.fsum(at_one_time) / len(crops) for at_one_time in zip(*by_crop[: len(crops)], strict=True)]

    @torch.no_grad()
    def _losses(self, crops: list, of_base: bool, stop: StopRequest) -> list[list[float]] | None:
        """Losses of each crop at ``TIMES``; None if asked to stop."""
        trainer, engine, group = self.trainer, self.trainer.engine, self.group
        by_crop = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncompiled(trainer.base.dit))
            if of_base:
                stack.callback(set_strength, trainer.base, 1.0)
                set_strength(trainer.base, 0.0)
            elif engine.formed is not None:
                # The formed weights are from before the last step; the next step forms them again.
                engine.formed.form()
            stack.enter_context(cached_norms(trainer.layers))
            for crop in crops:
                losses = []
                for batch in self.set.batches(crop):
                    group.liveness.progress()
                    requested = stop.requested()
                    # If ranks exchange tensors within a pass, all must stop before the same pass.
                    if group.any(requested) if engine.collectives_in_forward else requested:
                        return None
                    losses.append(engine.losses(batch.to(group.device))["loss_gen"])
                by_crop.append(torch.stack(losses).double().tolist())
        return by_crop
