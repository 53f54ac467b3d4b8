"""Previews during training: the same prompts and noise at intervals, to hear what the steps change.

They never change or end the training, and hold no memory while it steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sa3dist import __version__
from sa3dist.adapters import adapted_layers, formed_once, set_strength
from sa3dist.adapters.layers import cached_norms
from sa3dist.cost_model.devices import free_bytes
from sa3dist.errors import ConfigError, EnvironmentFailure, Interrupted, SA3DistError
from sa3dist.formats import write_json
from sa3dist.listening.audio_files import write_audio
from sa3dist.listening.spectrogram import write_spectrogram
from sa3dist.model.base import AUTOENCODER_PREFIX
from sa3dist.model.compiled import uncompiled
from sa3dist.model.generation import BATCH, Generation, borrowed_encoders
from sa3dist.runtime.process_group import main_process_first, run_on_all_ranks
from sa3dist.training.memory import USABLE_SHARE, working_bytes
from sa3dist.training.observers import Observation, Observer

if TYPE_CHECKING:
    from sa3dist.data.batches.batch_source import BatchSource
    from sa3dist.model.base import Base
    from sa3dist.model.config import ModelConfig
    from sa3dist.parallel.engine import Engine
    from sa3dist.runtime.process_group import Group
    from sa3dist.runtime.signals import StopRequest
    from sa3dist.settings import Settings
    from sa3dist.training.trainer import Trainer

log = logging.getLogger(__name__)

DEFAULT_SECONDS = 20.0
# Captions of the data set, used beside an empty prompt.
DEFAULT_CAPTIONS = 3
DECODER = f"{AUTOENCODER_PREFIX}decoder."


def check(settings: Settings, config: ModelConfig) -> None:
    """Before any preparation, refuse previews that cannot be made. Raises ConfigError."""
    if not settings.preview_every:
        return
    if settings.preview_seconds is not None:
        try:
            _generation(settings, settings.preview_seconds).check(config)
        except ConfigError as problem:
            raise ConfigError(f"preview_{problem}") from None


def of_run(trainer: Trainer, source: BatchSource) -> Previews | None:
    """The previews that the settings ask for; None = none. source: its captions are the default prompts."""
    settings, base = trainer.settings, trainer.base
    if not settings.preview_every:
        return None
    crop_seconds = source.draws.crop_frames * base.samples_per_frame / base.sample_rate_hz
    how = _generation(settings, settings.preview_seconds or min(DEFAULT_SECONDS, crop_seconds))
    prompts = settings.preview_prompts or default_prompts([clip.caption for clip in source.index.clips])
    base_sha256 = trainer.plan.identity["base_sha256"]
    about = {"model": settings.model, "base_sha256": base_sha256, "sa3dist_version": __version__}
    steps = PreviewSteps(settings.preview_every, settings.number_of_steps, trainer.step)
    engine = trainer.engine if trainer.engine.divided else None
    return Previews(base, trainer.group, settings.output_dir, how, prompts, about, steps, engine)


def default_prompts(captions: Sequence[str]) -> list[str]:
    """Captions far apart in the data set, and an empty prompt."""
    distinct = list(dict.fromkeys(captions))
    last = len(distinct) - 1
    picked = {round(last * i / (DEFAULT_CAPTIONS - 1)) for i in range(DEFAULT_CAPTIONS)} if distinct else set()
    return [*(distinct[i] for i in sorted(picked)), ""]


def _generation(settings: Settings, seconds: float) -> Generation:
    return Generation(seconds, settings.preview_steps, settings.preview_cfg, settings.preview_seed)


class PreviewSteps(NamedTuple):
    """The steps with previews: every ``every``-th and the last. The training continues from ``first``."""

    every: int
    last: int
    first: int = 0

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.last


class Previews(Observer):
    """Makes ``output_dir/previews/step-00000500/<i>.flac``, each with a JSON file and a picture.

    Prompt i uses the noise of ``base.generate``'s prompt i. Every rank makes its share, on its training device.
    """

    name = "previews"

    def __init__(
        self,
        base: Base,
        group: Group,
        output_dir: Path,
        how: Generation,
        prompts: Sequence[str],
        about: dict[str, Any],
        steps: PreviewSteps,
        engine: Engine | None = None,
    ) -> None:
        """about: description of the run for the JSON files; engine: evaluates a base divided over the ranks."""
        self.base, self.group, self.output_dir, self.engine = base, group, Path(output_dir), engine
        self.how, self.prompts, self.about = how, list(prompts), about
        self.steps = steps
        # Hidden states and mask by prompt, on the CPU, kept so that the text encoder need not load again.
        self._hidden: dict[str, tuple[Tensor, Tensor]] = {}
        self._warned = False

    def begin(self, stop: StopRequest) -> Observation:
        base = self._observe(0, stop)
        step = self.steps.first
        if not step or not self.steps.is_due(step):
            return base
        # Whether a signal cut them short; rank 0 looks at its disk for all.
        if not main_process_first(self.group, f"previews-of-{step}", lambda: self._missing(step), stop=None):
            return base
        also = self._observe(step, stop)
        sums = {name: value + base.sums[name] for name, value in also.sums.items()}
        return dataclasses.replace(also, seconds=base.seconds + also.seconds, sums=sums)

    def after_step(self, step: int, stop: StopRequest) -> Observation | None:
        return self._observe(step, stop) if self.steps.is_due(step) else None

    def _missing(self, step: int) -> int:
        return sum(not self._path(step, number, "json").exists() for number in range(len(self.prompts)))

    def _observe(self, step: int, stop: StopRequest) -> Observation:
        seconds, missing = self.make(step, stop)
        sums = {"previews_seconds": seconds, "previews_missing": missing}
        return Observation(step, seconds, sums, folder=self.folder(step), long=True)

    def make(self, step: int, stop: StopRequest) -> tuple[float, int]:
        """Make previews of the current adapters, after ``step``; for step 0 of the base, unless they exist.

        Returns the seconds it took, and how many previews of all ranks are missing. Ends early when asked to stop. Any
        other error is logged once.
        """
        begin = time.perf_counter()
        self.group.liveness.begin("making previews")
        missing = 0
        # The request also ends the training, after its next step.
        with contextlib.suppress(Interrupted):
            try:
                with self._as_after(step):
                    (self._generate_together if self.engine else self._generate)(step, stop)
            except Interrupted:
                raise
            except Exception as failure:
                self._report_failure(step, failure)
            run_on_all_ranks(self.group, f"previews-{step}", lambda: None, stop)
            missing = self._missing(step)
        return time.perf_counter() - begin, missing

    @contextlib.contextmanager
    def _as_after(self, step: int) -> Iterator[None]:
        """Prepare the base for previews of ``step``; afterwards restore it for the training."""
        base = self.base
        with contextlib.ExitStack() as stack:
            if self.group.device.type == "cuda":
                # Give cached memory back for the next step.
                stack.callback(torch.cuda.empty_cache)
            stack.enter_context(borrowed_encoders(base))
            stack.enter_context(uncompiled(base.dit))
            if step == 0:
                stack.callback(set_strength, base, 1.0)
                set_strength(base, 0.0)
            yield

    def _generate(self, step: int, stop: StopRequest) -> None:
        """Make this rank's share."""
        mine = range(self.group.dist_rank, len(self.prompts), self.group.world_size)
        todo = [(number, self.prompts[number]) for number in mine if step or not self._is_there(number)]
        if not todo:
            return
        self._require_memory(step)

        def before_step() -> None:
            self.group.liveness.progress()
            stop.raise_if_requested("making previews")

        with formed_once(self.base):
            for number, audio_CN in self.how.clips(self.base, todo, self._encode, before_step):
                self._write(step, number, audio_CN)

    def _generate_together(self, step: int, stop: StopRequest) -> None:
        """Make this rank's share where each rank holds a part of every layer: all evaluate the base equally often."""
        base, group = self.base, self.group
        numbers = range(len(self.prompts))
        if step == 0 and not group.any(not all(map(self._is_there, numbers))):
            return
        # Repeat some, so that all ranks have equally many.
        shared = [number % len(numbers) for number in range(-(-len(numbers) // group.world_size) * group.world_size)]
        mine = shared[group.dist_rank :: group.world_size]
        parts = [mine[begin : begin + BATCH] for begin in range(0, len(mine), BATCH)]

        def before_step() -> None:
            group.liveness.progress()
            # All ranks stop before the same evaluation.
            if group.any(stop.requested()):
                raise Interrupted("stopped while making previews")

        failure, latents = None, []
        try:
            self._require_memory(step)
            hidden = [self._encode([self.prompts[number] for number in part]) for part in parts]
        except Exception as problem:
            failure = problem
        # If one rank cannot make its share, no rank begins.
        if group.any(failure is not None):
            raise failure or EnvironmentFailure("another rank cannot make its share")
        with cached_norms(adapted_layers(base).values()):
            for part, conditioning in zip(parts, hidden, strict=True):
                work = functools.partial(self.how.latents, base, part, conditioning, before_step)
                latents += zip(part, self.engine.evaluate(work), strict=True)
        for number, latents_DT in dict(latents).items():
            if shared.index(number) % group.world_size == group.dist_rank:
                self._write(step, number, self.how.decode(base, latents_DT))

    def _require_memory(self, step: int) -> None:
        """Raises EnvironmentFailure if the training leaves too little device memory."""
        base = self.base
        layers = adapted_layers(base).values() if step and self.engine is None else ()
        formed = sum(layer.weight.numel() * layer.weight.dtype.itemsize for layer in layers)
        decoder = [math.prod(shape) for key, shape in base.weights.shapes.items() if key.startswith(DECODER)]
        tokens = 2 * BATCH * (self.how.frames(base.config) + base.config.dit.num_memory_tokens)
        needed = formed + 4 * sum(decoder) + working_bytes(base.config, tokens, base.dtype.itemsize)
        free = free_bytes(self.group.device)
        if needed > USABLE_SHARE * free:
            raise EnvironmentFailure(f"they need about {needed / 1e9:.1f} GB of memory, of {free / 1e9:.1f} GB free")

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        for prompt in prompts:
            if prompt not in self._hidden:
                # One by one: the bits then do not depend on which rank makes which prompts.
                hidden, mask = self.base.encode_hidden([prompt])
                self._hidden[prompt] = hidden.cpu(), mask.cpu()
        hidden, mask = zip(*(self._hidden[prompt] for prompt in prompts), strict=True)
        return torch.cat(hidden), torch.cat(mask)

    def folder(self, step: int) -> Path:
        return self.output_dir / "previews" / f"step-{step:08d}"

    def _path(self, step: int, number: int, suffix: str) -> Path:
        return self.folder(step) / f"{number}.{suffix}"

    def _text(self, step: int, number: int) -> dict[str, Any]:
        how = dataclasses.asdict(self.how)
        return {"prompt": self.prompts[number], "number": number, "step": step, **how, **self.about}

    def _is_there(self, number: int) -> bool:
        """Whether an earlier start has made this preview of the base; its JSON file is written last."""
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self._path(0, number, "json").read_text(encoding="utf-8"))
            return content == self._text(0, number) and self._path(0, number, "flac").exists()
        return False

    def _write(self, step: int, number: int, audio_CN: Tensor) -> None:
        write_audio(self._path(step, number, "flac"), audio_CN, self.base.sample_rate_hz)
        write_spectrogram(self._path(step, number, "png"), audio_CN, self.base.sample_rate_hz)
        write_json(self._path(step, number, "json"), self._text(step, number))

    def _report_failure(self, step: int, failure: Exception) -> None:
        is_explained = isinstance(failure, SA3DistError)
        reason = (str(failure) if is_explained else f"{type(failure).__name__}: {failure}").splitlines()[0]
        if not self._warned:
            # Not a warning: ranks other than 0 log only errors.
            log.error("previews of step %d left out: %s; training goes on, others are counted in silence", step, reason)
        self._warned = True
