"""The loss on held-out clips during a run: always on the same crops, noise and times, for adapters and base."""

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
    """The validation that the settings ask for; None = none."""
    return Validation(trainer, source) if source.held_out and trainer.settings.validation_every else None


class Validation(Observer):
    """Evaluates the fixed set every ``validation_every`` steps, publishes the best adapter, stops early.

    Every crop and time is one forward pass of one clip on one rank, with the adapters as in training passes. So the
    numbers do not depend on the number of ranks, and no pass needs more memory than a training step.
    """

    name = "validation"

    def __init__(self, trainer: Trainer, source: BatchSource) -> None:
        self.trainer, self.settings, self.group = trainer, trainer.settings, trainer.group
        self.set = FixedSet(source)
        self.history = History()

    def begin(self, stop: StopRequest) -> Observation | None:
        step = self.trainer.step
        found = main_process_first(self.group, "validation-history", self._read, stop=None)
        self.history = History(found["base"], [tuple(one) for one in found["losses"]], found["best"])
        if self.history.base is None:
            return self._evaluate(0, stop)
        # A signal has prevented this evaluation at the end of the earlier start.
        if step and self._due(step) and not self.history.has(step):
            return self._evaluate(step, stop)
        return Observation(step, 0.0, end=self._end())

    def after_step(self, step: int, stop: StopRequest) -> Observation | None:
        return self._evaluate(step, stop) if self._due(step) else None

    def _due(self, step: int) -> bool:
        return step % self.settings.validation_every == 0 or step == self.trainer.plan.steps

    def _read(self) -> dict[str, Any]:
        """On rank 0: read the run's history, and delete a best adapter that is not this run's."""
        output_dir, step = self.settings.output_dir, self.trainer.step
        history = History.read(output_dir, self.set.digest)
        of_this_run = history.best is not None and step > 0
        if self.settings.resume not in ("auto", "never"):
            # A run that continues from a named checkpoint may take another course.
            of_this_run = of_this_run and history.best[0] <= step
        if not of_this_run:
            history.best = None
            for name in (BEST_NAME, BEST_ADAPTER_NAME):
                (output_dir / name).unlink(missing_ok=True)
        return dataclasses.asdict(history)

    def _evaluate(self, step: int, stop: StopRequest) -> Observation:
        """step: 0 = evaluate the base, whatever the adapters hold."""
        begin = time.perf_counter()
        losses = self._mean_losses(step, stop)
        row, end = {}, ""
        if losses is not None:
            row = self._row(step, losses)
            end = self._end() if step else ""
        seconds = time.perf_counter() - begin
        return Observation(step, seconds, {"validation_seconds": seconds}, row, end=end, long=True)

    def _row(self, step: int, losses: list[float]) -> dict[str, Any]:
        """Record an evaluation, publish the adapter if it is the best, and return the row."""
        history = self.history
        mean = math.fsum(losses) / len(losses)
        # Infinity compares as worse than any number.
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
        """Why the training ends here; empty if it goes on."""
        patience, history = self.settings.early_stop, self.history
        if not patience or history.since_best < patience:
            return ""
        step, loss = min(history.losses, key=lambda one: one[1])
        found = counted(history.since_best, "evaluation")
        return f"early_stop: {found} without a lower validation loss than {loss:.4f}, after step {step}"

    def _publish(self, step: int, loss: float) -> None:
        """Write the current adapters as the best, on rank 0; called on all ranks."""
        trainer, output_dir = self.trainer, self.settings.output_dir
        tensors = trainer.engine.adapters()
        self.history.best = step, loss
        if self.group.is_main:
            lease.end_if_over()
            description = trainer.description()
            said = header(description), extras(description)
            write_adapter_file(output_dir / BEST_ADAPTER_NAME, trainer.base.adapter_config, tensors, *said)
            write_json(output_dir / BEST_NAME, {"step": step, LOSS: loss})

    def _mean_losses(self, step: int, stop: StopRequest) -> list[float] | None:
        """Mean loss over the set at each time, equal on all ranks; None if any rank was asked to stop."""
        group, crops = self.group, self.set.crops
        group.liveness.begin("validating")
        found = self._losses(self.set.of_ranks(group.world_size)[group.dist_rank :: group.world_size], step == 0, stop)
        # Wait without a time limit, which the collective below has.
        run_on_all_ranks(group, f"validation-{step}", lambda: None, stop=None)
        # By rank, then by position. Repeated crops come last, so the cut drops them.
        ranks = group.gather(found)
        if any(losses is None for losses in ranks):
            return None
        of_crops = [losses for place in zip(*ranks, strict=True) for losses in place][: len(crops)]
        return [math.fsum(at_one_time) / len(crops) for at_one_time in zip(*of_crops, strict=True)]

    @torch.no_grad()
    def _losses(self, crops: list, of_base: bool, stop: StopRequest) -> list[list[float]] | None:
        """Losses at ``TIMES`` of each crop; None when asked to stop."""
        trainer, engine, group = self.trainer, self.trainer.engine, self.group
        found = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncompiled(trainer.base.dit))
            if of_base:
                stack.callback(set_strength, trainer.base, 1.0)
                set_strength(trainer.base, 0.0)
            elif engine.formed is not None:
                # Form with the adapters just stepped; the next step forms again.
                engine.formed.form()
            stack.enter_context(cached_norms(trainer.layers))
            for crop in crops:
                losses = []
                for batch in self.set.batches(crop):
                    group.liveness.progress()
                    asked = stop.requested()
                    # Ranks that exchange tensors within a pass must all stop before the same pass.
                    if group.any(asked) if engine.collectives_in_forward else asked:
                        return None
                    losses.append(engine.losses(batch.to(group.device))["loss_gen"])
                found.append(torch.stack(losses).double().tolist())
        return found
