"""All observers of a run, as its settings ask for them: another observer is one line here."""

from sa3dist.data.batches.batch_source import BatchSource
from sa3dist.listening import copies, health, previews
from sa3dist.model.base import Base
from sa3dist.report import background
from sa3dist.training.observers import Observer
from sa3dist.training.trainer import Trainer
from sa3dist.validation import observer as validation


def observers_of(trainer: Trainer, base: Base, source: BatchSource) -> list[Observer]:
    """In calling order; only the page's if no step is left. source: the training clips."""
    settings, group = trainer.settings, trainer.group
    previews_observer = previews.of_run(trainer, source)
    if trainer.step >= trainer.plan.steps:
        # Nothing to observe, but an earlier start may not have written into the page how the run ended.
        writer = background.of_run(settings, group, trainer.step)
        if writer is not None:
            writer.finish(early=False)
        return [] if writer is None else [writer]
    observers = [
        validation.of_run(trainer, source),
        previews_observer,
        copies.of_run(settings, previews_observer, source, trainer.step),
        health.of_run(settings, base, trainer.engine, group, trainer.step),
        background.of_run(settings, group, trainer.step),
    ]
    return [observer for observer in observers if observer is not None]
