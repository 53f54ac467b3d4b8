"""Stage three: the training loop. Latents and prompt features in, checkpoints of the adapters out."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sa3dist import flow
from sa3dist.adapters import tensors_digest
from sa3dist.data.lanes import LanePlaces
from sa3dist.data.order import ClipOrder
from sa3dist.data.stream import MicroBatch
from sa3dist.errors import CheckpointError, EnvironmentFailure, Interrupted, OutOfMemory, SA3DistError
from sa3dist.metrics import MetricsFile, progress
from sa3dist.parallel import checkpoint, engines
from sa3dist.parallel.group import Group, on_main_first
from sa3dist.parallel.outcome import translate
from sa3dist.parallel.pulse import AVERAGING
from sa3dist.parallel.saving import Saver
from sa3dist.parallel.signals import StopRequest
from sa3dist.schedule import Schedule

log = logging.getLogger(__name__)

# The slowest of as many steps is what the next one may take.
RECENT_STEPS = 20
COMPUTING = "computing gradients"

# What travels with the gradients: sums over the step's micro batches and ranks.
LOSS, LOSS_GEN, LOSS_CTX, STOP, TROUBLE, SILENT, REPEATED, SAVING = range(8)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one run divides its work.

    accumulation    micro batches per rank and step
    global_batch    clips per step over all ranks
    identity        what a checkpoint must agree with to be continued: JSON values by name
    clip_keys       keys of the dataset's clips, in index order; empty where a stream has no index
    order           which of them each slot trains on; None = the plain shuffle
    schedule        the learning rate of each step; None = the settings' learning_rate throughout
    description     what config.json says of the run beside the step; kept with every checkpoint for an offline export
    adapt_memory    do a step that runs out of memory again, with gradient checkpointing
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
    adapt_memory: bool = False

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
        self.engine = engines.make(base, parameters, forward, settings, plan, group, scalars=SAVING + 1)
        self.saver = Saver()
        # Where a stream without an index is; None where the step alone says it.
        self.places: LanePlaces | None = None
        self._clips: list[list[str]] = []
        # The step from which on blocks are recomputed because memory did not suffice.
        self.adapted_at: int | None = None

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
            self.group.pulse.beat("waiting for data")
            asked = time.perf_counter()
            batch = self._fetch(batches)
            waited += time.perf_counter() - asked
            self.group.pulse.beat(COMPUTING)
            loss, loss_gen, loss_ctx = self.engine.losses(batch)
            self.engine.backward(loss / self.plan.accumulation, last=left == 0)
            parts = torch.stack([loss.detach(), loss_gen.detach(), loss_ctx.detach()])
            self.engine.scalars[LOSS : LOSS_CTX + 1] += parts
            self.engine.scalars[SILENT] += batch.silent_crops
            self.engine.scalars[REPEATED] += batch.repeated_clips
            losses.append((batch.clips, parts[0]))
        return waited, losses

    def _fetch(self, batches: Iterator[MicroBatch]) -> MicroBatch:
        """The next micro batch. In lockstep all ranks fail here when any has none, or could not save."""
        batch, failure = None, None
        try:
            self.saver.check()
            batch = next(batches)
        except Exception as error:
            failure = error
        if self.engine.lockstep and self.group.any(failure is not None):
            self.group.agree(None if failure is None else self._explain(failure))
        if failure is not None:
            raise failure
        return batch

    def take_step(self, batches: Iterator[MicroBatch], stop: StopRequest) -> dict[str, float]:
        """One optimiser step over all ranks. Returns its figures, equal on every rank.

        Raises on every rank alike when any rank failed or the loss is not finite; the adapters then stay as they were.
        """
        if not (self.plan.adapt_memory and self.adapted_at is None):
            return self._attempt(batches, stop)
        taken: list[MicroBatch] = []
        try:
            return self._attempt(remembering(batches, taken), stop)
        except OutOfMemory as problem:
            self._recompute_from_here(problem)
        # The same micro batches: recomputing blocks changes no bit of their gradients.
        return self._attempt(itertools.chain(taken, batches), stop)

    def _attempt(self, batches: Iterator[MicroBatch], stop: StopRequest) -> dict[str, float]:
        pulse = self.group.pulse
        pulse.beat("beginning", step=self.step + 1)
        self.engine.zero()
        waited, losses, problem = 0.0, [], None
        try:
            waited, losses = self.accumulate(batches)
        except Exception as failure:
            if self.engine.lockstep:
                raise
            # Peers wait in the reduction below: join it first, fail afterwards, all together.
            problem = self._explain(failure)
            self.engine.scalars[TROUBLE] = 1
        self.engine.scalars[STOP] = float(stop())
        self.engine.scalars[SAVING] = float(self.saver.busy)
        pulse.beat(AVERAGING)
        grad_norm = self.engine.average()
        *figures, norm = torch.cat([self.engine.scalars, grad_norm[None]]).tolist()
        # As long as rank 0 has a save in flight no signal ends any rank.
        stop.saving = figures[SAVING] > 0
        if figures[TROUBLE]:
            self.group.agree(problem)
        count = self.plan.accumulation * self.group.world_size
        means = [value / count for value in figures[: LOSS_CTX + 1]]
        if not (math.isfinite(means[LOSS]) and math.isfinite(norm)):
            self._name_the_non_finite(losses)
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
        if not isinstance(problem, OutOfMemory) or not self.plan.adapt_memory:
            return problem
        if self.base.gradient_checkpointing or self.group.pulse.doing != COMPUTING:
            return EnvironmentFailure(
                f"step {self.step + 1}: recomputing blocks is not enough to fit into memory, and batch_size "
                f"({self.plan.micro_batch}) decides what is trained, so on_oom: adapt can do no more; choose a shorter "
                f"duration, a lower rank, or a smaller batch_size and another output_dir ({problem})"
            )
        return problem

    def _recompute_from_here(self, problem: OutOfMemory) -> None:
        self.base.gradient_checkpointing = True
        self.adapted_at = self.step + 1
        gc.collect()
        if self.group.device.type == "cuda":
            torch.cuda.empty_cache()
        where = "rank {} on {}".format(*problem.origin) if problem.origin else "this rank"
        log.warning("step %d: out of memory on %s; recomputing blocks from here on", self.step + 1, where)

    def _name_the_non_finite(self, losses: list[tuple[list[str], torch.Tensor]]) -> None:
        mine = [key for clips, loss in losses if not bool(loss.isfinite()) for key in clips]
        told = self.group.gather((mine, socket.gethostname()))
        clips = sorted({key for keys, _ in told for key in keys})
        found = f"loss of clip {', '.join(clips)}" if clips else "gradient"
        problem = EnvironmentFailure(
            f"step {self.step + 1}: the {found} is not finite; training stopped, state is as last saved. "
            f"Look at that clip, or lower learning_rate"
        )
        problem.origin = next(((n, host) for n, (keys, host) in enumerate(told) if keys), (0, told[0][1]))
        raise problem

    def check_ranks_agree(self, adapters: dict[str, torch.Tensor]) -> None:
        """Raises EnvironmentFailure on all ranks when they hold different, empty or non-finite adapters."""
        bad = next((name for name, value in adapters.items() if not (value.numel() and value.isfinite().all())), None)
        held = self.group.gather((tensors_digest(adapters), bad))
        if len({digest for digest, _ in held}) > 1:
            raise EnvironmentFailure(f"step {self.step}: the ranks' adapters differ; state is as last saved")
        found = next((name for _, name in held if name is not None), None)
        if found is not None:
            raise EnvironmentFailure(f"step {self.step}: {found} is empty or not finite; state is as last saved")

    def save(self, output_dir: Path, stop: StopRequest, wait: bool, before: Callable[[], None] = lambda: None) -> None:
        """Copy the state and publish it on rank 0; first check that the ranks hold equal, finite adapters.

        wait     return, on every rank, when it is published; otherwise rank 0 writes it while the training goes on
        before   run ahead of the publication, beside the training likewise
        """
        self.group.pulse.beat("saving")
        # On all ranks: some modes gather it.
        adapters, moments = self.engine.adapters(), self.engine.moments()
        self.check_ranks_agree(adapters)
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
            on_main_first(self.group, f"save-{self.step}", publish_now, should_stop=lambda: False)
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


def remembering(batches: Iterator[MicroBatch], taken: list[MicroBatch]) -> Iterator[MicroBatch]:
    """The same micro batches, each also put into ``taken``."""
    for batch in batches:
        taken.append(batch)
        yield batch


class Journal:
    """What is said of the steps on rank 0: a row of metrics.jsonl now and then, and the progress bar."""

    def __init__(
        self, trainer: Trainer, output_dir: Path, resumed_from: int | None, update: Callable, describe: Callable
    ) -> None:
        self._trainer, self._update, self._describe = trainer, update, describe
        self._metrics = MetricsFile(output_dir, resumed_from) if trainer.group.is_main else None
        self._begin = self._clock = time.perf_counter()
        self._first = self._last_logged = trainer.step
        self._waited = self._silent = 0.0

    def add(self, figures: dict[str, float]) -> None:
        """Take up the figures of one step as ``take_step`` gave them."""
        plan, settings, step = self._trainer.plan, self._trainer.settings, self._trainer.step
        self._waited += figures.pop("data_wait_seconds")
        self._silent += figures.pop("silent_crops")
        now = time.perf_counter()
        data_wait = self._waited / (now - self._clock)
        logged = step % settings.log_every == 0 or step == plan.steps
        # On all ranks: without an index each knows only its own.
        clips = self._trainer.clips_of_step() if logged and settings.log_clips else None
        if self._metrics and logged:
            row = {"step": step, **figures, "clips_seen": step * plan.global_batch}
            row["silent_crops"] = int(self._silent)
            if self._trainer.places is None:
                row["epoch"] = step * plan.global_batch / len(plan.clip_keys)
            else:
                row["repeated_clips"] = self._trainer.places.repeated
            row |= {"step_seconds": (now - self._clock) / (step - self._last_logged), "data_wait": data_wait}
            row |= self._describe()
            if clips is not None:
                row["clips"] = clips
            self._metrics.write(row)
            self._clock, self._waited, self._silent, self._last_logged = now, 0.0, 0.0, step
        rate = (step - self._first) / (now - self._begin)
        self._update(step, f"loss {figures['loss']:.4f} {rate:.2f} it/s, {data_wait:.0%} waiting for data")

    def sync(self) -> None:
        """Make the rows as durable as the checkpoint that follows."""
        if self._metrics:
            self._metrics.sync()


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
    saved_step, recent = trainer.step, collections.deque(maxlen=RECENT_STEPS)
    with contextlib.ExitStack() as stack:
        update = stack.enter_context(progress("train", plan.steps, shown=group.is_main))
        # However the training ends: a save that has begun is finished.
        stack.callback(trainer.saver.close)
        journal = Journal(trainer, output_dir, resumed_from, update, describe)
        while trainer.step < plan.steps:
            begin = time.perf_counter()
            try:
                figures = trainer.take_step(batches, stop)
            except Interrupted:
                # Asked to stop while clips of the next step were being encoded.
                if trainer.step > saved_step:
                    trainer.save(output_dir, stop, wait=True, before=journal.sync)
                raise
            if len(recent) == 0:
                on_first_step(figures["data_wait_seconds"])
            stopping = figures.pop("stop") > 0
            journal.add(figures)
            recent.append(time.perf_counter() - begin)
            stop.reserve(max(recent), trainer.saver.seconds)
            step = trainer.step
            if stopping or step % settings.save_every == 0 or step == plan.steps:
                trainer.save(output_dir, stop, wait=stopping or step == plan.steps, before=journal.sync)
                saved_step = step
            if stopping and step < plan.steps:
                how = "run the same command" if settings.resume == "auto" else "run again with resume=auto"
                why = f" ({stop.reason})" if stop.reason else ""
                raise Interrupted(f"stopped after step {step}{why}, state saved; {how} to continue")
