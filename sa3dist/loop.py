"""Stage three: the training loop. Latents and prompt features in, checkpoints of the adapters out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sa3dist import flow
from sa3dist.adapters import tensors_digest
from sa3dist.data.order import ClipOrder
from sa3dist.data.stream import MicroBatch
from sa3dist.errors import CheckpointError, EnvironmentFailure, Interrupted, SA3DistError
from sa3dist.metrics import MetricsFile, progress
from sa3dist.parallel import checkpoint, engines
from sa3dist.parallel.group import Group, on_main_first
from sa3dist.parallel.outcome import translate
from sa3dist.parallel.signals import StopRequest
from sa3dist.schedule import Schedule

log = logging.getLogger(__name__)

# What travels with the gradients: sums over the step's micro batches and ranks.
LOSS, LOSS_GEN, LOSS_CTX, STOP, TROUBLE, SILENT = range(6)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one run divides its work.

    accumulation    micro batches per rank and step
    global_batch    clips per step over all ranks
    identity        what a checkpoint must agree with to be continued: JSON values by name
    clip_keys       keys of the dataset's clips, in index order
    order           which of them each slot trains on; None = the plain shuffle
    schedule        the learning rate of each step; None = the settings' learning_rate throughout
    description     what config.json says of the run beside the step; kept with every checkpoint for an offline export
    """

    steps: int
    accumulation: int
    micro_batch: int
    global_batch: int
    seed: int
    identity: dict[str, Any]
    clip_keys: list[str]
    order: ClipOrder | None = None
    schedule: Schedule | None = None
    description: dict[str, Any] = dataclasses.field(default_factory=dict)

    def clips_of_step(self, step: int) -> list[str]:
        """Keys of the clips all ranks train on in a step, in slot order."""
        slots = range((step - 1) * self.global_batch, step * self.global_batch)
        order = self.order or ClipOrder(self.seed, len(self.clip_keys))
        return [self.clip_keys[order.clip_of_slot(slot)] for slot in slots]


def micro_batch_loss(base, batch: MicroBatch, settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of one micro batch where it is: (loss, loss_gen, loss_ctx).

    settings   gives ``mixed_precision`` and ``context_weight``
    """
    device = batch.noised_BDT.device.type
    # Nothing given is the same at every frame: the network then evaluates its local conditioning once.
    context = (batch.inpaint_mask_B1T, batch.latents_BDT) if batch.has_context else (None, None)
    with torch.autocast(device, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
        velocity_BDT = base.velocity(
            batch.noised_BDT,
            batch.t_B,
            base.embed_prompts(batch.hidden_BLH, batch.prompt_mask_BL),
            batch.prompt_mask_BL,
            batch.seconds_total_B,
            padding_mask_BT=batch.keep_BT,
            inpaint_mask_B1T=context[0],
            inpaint_latents_BDT=context[1],
            drop_cross_B=batch.drop_cross_B,
            prompt_length=batch.prompt_length,
            packing=batch.packing,
        )
    keep_BT = batch.keep_BT
    if keep_BT is None:
        keep_BT = torch.ones_like(batch.inpaint_mask_B1T[:, 0], dtype=torch.bool)
    return flow.masked_loss(velocity_BDT, batch.target_BDT, keep_BT, batch.inpaint_mask_B1T, settings.context_weight)


class Trainer:
    """One rank's part of the loop: gradients of its micro batches, the common step, saving."""

    def __init__(self, base, parameters: dict[str, torch.nn.Parameter], settings, plan: Plan, group: Group) -> None:
        self.base = base
        self.settings = settings
        self.plan = plan
        self.group = group
        self.step = 0
        self.schedule = plan.schedule or Schedule(settings.learning_rate, plan.steps)
        forward = functools.partial(micro_batch_loss, base, settings=settings)
        self.engine = engines.make(base, parameters, forward, settings, plan, group, scalars=SILENT + 1)

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
            asked = time.perf_counter()
            batch = self._fetch(batches)
            waited += time.perf_counter() - asked
            loss, loss_gen, loss_ctx = self.engine.losses(batch)
            self.engine.backward(loss / self.plan.accumulation, last=left == 0)
            parts = torch.stack([loss.detach(), loss_gen.detach(), loss_ctx.detach()])
            self.engine.scalars[LOSS : LOSS_CTX + 1] += parts
            self.engine.scalars[SILENT] += batch.silent_crops
            losses.append((batch.clips, parts[0]))
        return waited, losses

    def _fetch(self, batches: Iterator[MicroBatch]) -> MicroBatch:
        """The next micro batch. In lockstep all ranks fail here when any of them has none."""
        batch, failure = None, None
        try:
            batch = next(batches)
        except Exception as error:
            failure = error
        if self.engine.lockstep and self.group.any(failure is not None):
            self._fail_together(failure)
        if failure is not None:
            raise failure
        return batch

    def take_step(self, batches: Iterator[MicroBatch], stop: StopRequest) -> dict[str, float]:
        """One optimiser step over all ranks. Returns its figures, equal on every rank.

        Raises on every rank alike when any rank failed or the loss is not finite; the adapters then stay as they were.
        """
        self.engine.zero()
        waited, losses, failure = 0.0, [], None
        try:
            waited, losses = self.accumulate(batches)
        except Exception as error:
            if self.engine.lockstep:
                raise
            # Peers wait in the reduction below: join it first, fail afterwards, all together.
            failure = error
            self.engine.scalars[TROUBLE] = 1
        self.engine.scalars[STOP] = float(stop())
        grad_norm = self.engine.average()
        *figures, norm = torch.cat([self.engine.scalars, grad_norm[None]]).tolist()
        if figures[TROUBLE]:
            self._fail_together(failure)
        count = self.plan.accumulation * self.group.world_size
        means = [value / count for value in figures[: LOSS_CTX + 1]]
        if not (math.isfinite(means[LOSS]) and math.isfinite(norm)):
            self._name_the_non_finite(losses)
        rate = self.schedule.rate(self.step + 1)
        self.engine.step(rate)
        self.step += 1
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

    def _fail_together(self, failure: Exception | None) -> None:
        problem = None if failure is None else translate(failure)
        if failure is not None and problem is None:
            problem = SA3DistError(f"{type(failure).__name__}: {failure}")
            log.error("step %d failed", self.step + 1, exc_info=failure)
        self.group.agree(problem)

    def _name_the_non_finite(self, losses: list[tuple[list[str], torch.Tensor]]) -> None:
        mine = [key for clips, loss in losses if not bool(loss.isfinite()) for key in clips]
        clips = sorted({key for keys in self.group.gather(mine) for key in keys})
        found = f"loss of clip {', '.join(clips)}" if clips else "gradient"
        raise EnvironmentFailure(
            f"step {self.step + 1}: the {found} is not finite; training stopped, state is as last saved. "
            f"Look at that clip, or lower learning_rate"
        )

    def check_ranks_agree(self, adapters: dict[str, torch.Tensor]) -> None:
        """Raises EnvironmentFailure on all ranks when they hold different, or non-finite, adapters."""
        finite = all(bool(value.isfinite().all()) for value in adapters.values())
        held = self.group.gather((tensors_digest(adapters), finite))
        if len({digest for digest, _ in held}) > 1:
            raise EnvironmentFailure(f"step {self.step}: the ranks' adapters differ; state is as last saved")
        if not all(ok for _, ok in held):
            raise EnvironmentFailure(f"step {self.step}: an adapter value is not finite; state is as last saved")

    def save(self, output_dir: Path, stop: StopRequest) -> None:
        """Write a checkpoint on rank 0 while all ranks wait; first check that the ranks hold equal, finite adapters."""
        # On all ranks: some modes gather it.
        adapters, moments = self.engine.adapters(), self.engine.moments()
        self.check_ranks_agree(adapters)

        def write() -> None:
            state = {"step": self.step, "global_batch": self.plan.global_batch, "identity": self.plan.identity}
            state |= {"schedule": dataclasses.asdict(self.schedule), "weight_decay": self.settings.weight_decay}
            state |= {"world_size": self.group.world_size, "torch": torch.__version__}
            state |= {"description": self.plan.description}
            checkpoint.save(output_dir, checkpoint.Checkpoint(adapters, moments, state), self.settings.keep_checkpoints)

        stop.saving = True
        try:
            on_main_first(self.group, f"save-{self.step}", write, should_stop=lambda: False)
        finally:
            stop.saving = False


def train(
    trainer: Trainer,
    batches: Iterator[MicroBatch],
    stop: StopRequest,
    output_dir: Path,
    resumed_from: int | None,
    describe: Callable[[], dict[str, Any]] = dict,
    on_first_step: Callable[[float], None] = lambda waited: None,
) -> None:
    """Train from the trainer's step to the plan's last one, saving on the way and at the end.

    describe   extra figures for a logged row, e.g. peak memory
    on_first_step   called when the first step is done, with the seconds it waited for data
    Raises Interrupted after saving when any rank was asked to stop.
    """
    settings, plan, group = trainer.settings, trainer.plan, trainer.group
    metrics = MetricsFile(output_dir, resumed_from) if group.is_main else None
    with contextlib.ExitStack() as stack:
        update = stack.enter_context(progress("train", plan.steps, shown=group.is_main))
        begin, first = time.perf_counter(), trainer.step
        clock, waited, silent, last_logged = begin, 0.0, 0.0, first
        while trainer.step < plan.steps:
            figures = trainer.take_step(batches, stop)
            step = trainer.step
            if step == first + 1:
                on_first_step(figures["data_wait_seconds"])
            stopping = figures.pop("stop") > 0
            waited += figures.pop("data_wait_seconds")
            silent += figures.pop("silent_crops")
            data_wait = waited / (time.perf_counter() - clock)
            if metrics and (step % settings.log_every == 0 or step == plan.steps):
                elapsed = time.perf_counter() - clock
                row = {"step": step, **figures, "clips_seen": step * plan.global_batch}
                row |= {"epoch": step * plan.global_batch / len(plan.clip_keys), "silent_crops": int(silent)}
                row |= {"step_seconds": elapsed / (step - last_logged), "data_wait": waited / elapsed, **describe()}
                if settings.log_clips:
                    row["clips"] = plan.clips_of_step(step)
                metrics.write(row)
                clock, waited, silent, last_logged = time.perf_counter(), 0.0, 0.0, step
            rate = (step - first) / (time.perf_counter() - begin)
            update(step, f"loss {figures['loss']:.4f} {rate:.2f} it/s, {data_wait:.0%} waiting for data")
            if stopping or step % settings.save_every == 0 or step == plan.steps:
                if metrics:
                    metrics.sync()
                trainer.save(output_dir, stop)
            if stopping and step < plan.steps:
                how = "run the same command" if settings.resume == "auto" else "run again with resume=auto"
                raise Interrupted(f"stopped after step {step}, state saved; {how} to continue")
