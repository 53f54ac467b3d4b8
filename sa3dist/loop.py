"""Stage three: the training loop. Latents and prompt features in, checkpoints of the adapters out."""

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.errors import Interrupted
from sa3dist.progress import progress
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.metrics import MetricsLogger
from sa3dist.training.observers import Observation, Observer, close_together
from sa3dist.training.startup_times import Startup
from sa3dist.training.trainer import Trainer

log = logging.getLogger(__name__)

# The next step may take as long as the slowest of this many.
RECENT_STEPS = 20


def train(
    trainer: Trainer,
    batches: Iterator[MicroBatch],
    stop: StopRequest,
    output_dir: Path,
    resumed_from: int | None,
    startup: Startup | None = None,
    observers: Sequence[Observer] = (),
) -> str:
    """Train from the trainer's step to the plan's last one, saving on the way and at the end.

    startup    times of the start so far, for the first row of metrics.jsonl
    observers  called in this order before the first step, after every step and after every save
    Returns why the training ended before the plan's last step; empty if it did not.
    Raises Interrupted after saving when any rank was asked to stop.
    """
    settings, plan, group = trainer.settings, trainer.plan, trainer.group
    saved_step, recent, end = trainer.step, collections.deque(maxlen=RECENT_STEPS), ""
    with contextlib.ExitStack() as stack:
        update = stack.enter_context(progress("train", plan.steps, shown=group.is_main))
        metrics = MetricsLogger(trainer, output_dir, resumed_from, update, startup)
        # Runs after the saver is closed.
        stack.callback(
            lambda: close_together([*observers, metrics], trainer.step < plan.steps and not end, settings.step_timeout)
        )
        # However the training ends, a save in flight is finished, within the time the watchdog leaves this process.
        stack.callback(trainer.saver.close)
        end, stopping = observe([partial(_begin, one, stop, startup) for one in observers], metrics, group, stop)
        if stopping and not end:
            raise Interrupted(f"stopped before step {saved_step + 1}{because(stop)}; run the same command to continue")
        if startup:
            startup.begin("first_step")
        while trainer.step < plan.steps and not end:
            begin = time.perf_counter()
            try:
                values = trainer.take_step(batches, stop)
            except Interrupted:
                # Stopped while clips of the next step were being encoded.
                if trainer.step > saved_step:
                    trainer.save(output_dir, stop, wait=True, before=metrics.sync)
                raise
            stopping, step = values["stop"] > 0, trainer.step
            recent.append(time.perf_counter() - begin)
            stop.reserve(max(recent), trainer.saver.seconds)
            if not stopping:
                looks = [partial(observer.after_step, step, stop) for observer in observers]
                end, stopping = observe(looks, metrics, group, stop)
            last = bool(end) or step == plan.steps
            metrics.add(values, last)
            if stopping or last or step % settings.save_every == 0:
                trainer.save(output_dir, stop, wait=stopping or last, before=metrics.sync)
                saved_step = step
                for observer in observers:
                    observer.after_save(step, stopping or last)
            if stopping and not last:
                how = "run the same command" if settings.resume == "auto" else "run again with resume=auto"
                raise Interrupted(f"stopped after step {step}{because(stop)}, state saved; {how} to continue")
    if end:
        log.info("ends after step %d: %s", trainer.step, end)
    return end


def because(stop: StopRequest) -> str:
    return f" ({stop.reason})" if stop.reason else ""


def observe(
    looks: Iterable[Callable[[], Observation | None]], metrics: MetricsLogger, group: Group, stop: StopRequest
) -> tuple[str, bool]:
    """Add what the observers find to the metrics, one by one, until any rank is asked to stop.

    Returns why the training is to end (empty: it goes on) and whether any rank was asked to stop; equal on all ranks.
    """
    end = ""
    for look in looks:
        seen = look()
        metrics.add_observation(seen)
        if seen is not None:
            end = end or seen.end
            # Checked here, not a step later: the next start repeats an observation that a signal has cut short.
            if seen.long and group.any(stop.requested()):
                return end, True
    return end, False


def _begin(observer: Observer, stop: StopRequest, startup: Startup | None) -> Observation | None:
    if startup:
        startup.begin(observer.name)
    return observer.begin(stop)
