"""Stage three: the training loop. Latents and prompt features in, checkpoints of the adapters out."""

import collections
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.errors import Interrupted
from sa3dist.listening.previews import Previews
from sa3dist.progress import progress
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.metrics import MetricsLogger
from sa3dist.training.startup_times import Startup
from sa3dist.training.trainer import Trainer

# The slowest of as many steps is what the next one may take.
RECENT_STEPS = 20


def train(
    trainer: Trainer,
    batches: Iterator[MicroBatch],
    stop: StopRequest,
    output_dir: Path,
    resumed_from: int | None,
    startup: Startup | None = None,
    previews: Previews | None = None,
) -> None:
    """Train from the trainer's step to the plan's last one, saving on the way and at the end.

    startup   the parts of the start until here, for the first row of metrics.jsonl
    previews  made before the first step and when they are due; None: none
    Raises Interrupted after saving when any rank was asked to stop.
    """
    settings, plan, group = trainer.settings, trainer.plan, trainer.group
    saved_step, recent = trainer.step, collections.deque(maxlen=RECENT_STEPS)
    with contextlib.ExitStack() as stack:
        update = stack.enter_context(progress("train", plan.steps, shown=group.is_main))
        metrics = MetricsLogger(trainer, output_dir, resumed_from, update, startup)
        # Behind the last save.
        stack.callback(lambda: metrics.close(early=trainer.step < plan.steps))
        # However the training ends: a save that has begun is finished, in the time the watchdog leaves this process.
        stack.callback(trainer.saver.close)
        if previews is not None:
            if startup:
                startup.begin("previews")
            metrics.add_previews(0, previews.folder(0), *previews.make(0, stop))
            if startup:
                startup.begin("first_step")
        while trainer.step < plan.steps:
            begin = time.perf_counter()
            try:
                figures = trainer.take_step(batches, stop)
            except Interrupted:
                # Asked to stop while clips of the next step were being encoded.
                if trainer.step > saved_step:
                    trainer.save(output_dir, stop, wait=True, before=metrics.sync)
                raise
            stopping, step = figures["stop"] > 0, trainer.step
            recent.append(time.perf_counter() - begin)
            stop.reserve(max(recent), trainer.saver.seconds)
            if previews is not None and previews.due(step, plan.steps) and not stopping:
                metrics.add_previews(step, previews.folder(step), *previews.make(step, stop))
            metrics.add(figures)
            if stopping or step % settings.save_every == 0 or step == plan.steps:
                trainer.save(output_dir, stop, wait=stopping or step == plan.steps, before=metrics.sync)
                saved_step = step
            if stopping and step < plan.steps:
                how = "run the same command" if settings.resume == "auto" else "run again with resume=auto"
                why = f" ({stop.reason})" if stop.reason else ""
                raise Interrupted(f"stopped after step {step}{why}, state saved; {how} to continue")
