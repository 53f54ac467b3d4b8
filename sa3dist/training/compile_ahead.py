"""A GPU run's programs and kernels, compiled by other processes while the base is loaded and clips are encoded.

Each has a base of random weights with two blocks: all blocks run the same programs. What it compiles lies in the caches
of ``work_dir``, where the run finds it instead of compiling it at its first step. Two take a few passes: micro batches
with and without given context have a program each. A third forms weights and finishes gradients, which is done outside
of passes. In turn they take thrice as long as what they hide in.

    python -m sa3dist.training.compile_ahead context|none|kernels < settings, pickled; or nothing, to end
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import importlib
import logging
import os
import pickle
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sa3dist_kernels.dispatch import obstacle_to

from sa3dist.adapters import adapter_parameters, attach_adapter
from sa3dist.adapters.formed import product_format
from sa3dist.data.batches.micro_batch import Sample, SampleSettings, collate
from sa3dist.errors import SA3DistError
from sa3dist.formats import digest_of
from sa3dist.model.base import Base
from sa3dist.model.compiled import start_compile_workers, wants_compile
from sa3dist.model.loading import known_config
from sa3dist.model.random_weights import RandomWeights
from sa3dist.parallel.ddp import FlatEngine
from sa3dist.parallel.flat_adamw import FlatAdapters
from sa3dist.runtime import cuda_driver
from sa3dist.runtime.process_group import Group, main_process_first
from sa3dist.runtime.signals import end_with_parent
from sa3dist.training.acceleration import compile_whole_blocks, longest_frames, make_deterministic
from sa3dist.training.compile_processes import CACHE_VARIABLE, CONTEXT, KERNELS, MARK, PROGRAMS, Compiling
from sa3dist.training.loss import micro_batch_loss
from sa3dist.training.shape_ladder import ShapeLadder

if TYPE_CHECKING:
    from sa3dist.model.config import ModelConfig
    from sa3dist.runtime.signals import StopRequest
    from sa3dist.settings import Settings
    from sa3dist.training.startup_times import Startup

log = logging.getLogger(__name__)

BLOCKS = 2
# Kernels are of one kind for few tokens and of another for many.
SHORT_FRAMES = 128
# What the programs depend on beside the model. How many blocks are recomputed changes none.
FIELDS = (
    "adapter_type", "rank", "alpha", "include", "exclude", "base_precision", "mixed_precision", "adapter_products",
    "batch_size", "duration", "compile", "reference_numerics", "deterministic",
)  # fmt: skip
# No start waits longer than this for what it would otherwise compile itself.
PATIENCE_SECONDS = 30.0
POLL_SECONDS = 0.1


class CompilingAhead:
    """The processes, where this run has some."""

    def __init__(
        self, settings: Settings, group: Group, dtype: torch.dtype, started: dict[str, Compiling] | None = None
    ) -> None:
        """On a CUDA device, before the base is loaded and once the caches have their places. What fails is logged.

        dtype     of the base's weights
        started   by program, processes that wait for what to compile; those that are needed are taken out
        """
        self._processes: list[Compiling] = []
        device = group.device
        compiles = wants_compile(settings.compile, device, settings.number_of_steps)
        formed = settings.adapter_products != "factored" and not group.divides_model
        if not (compiles and formed and group.is_main):
            return
        for program in PROGRAMS:
            if not _mark(settings, device, program).exists():
                waiting = (started or {}).pop(program, None) or self._start(program)
                if waiting is not None:
                    waiting.give(pickle.dumps((settings, device, dtype)))
                    self._processes.append(waiting)

    def _start(self, program: str) -> Compiling | None:
        try:
            return Compiling.start(program)
        except OSError as failure:
            log.info("not compiled ahead, the first steps take longer: %s", failure)
            return None

    def wait(self, group: Group, stop: StopRequest, startup: Startup) -> None:
        """Return on every rank when all have ended and their memory on the device is free; a part of the start.

        Raises Interrupted when asked to stop.
        """
        startup.begin("compile_ahead")
        main_process_first(group, "compiled-ahead", lambda: self._wait(stop), stop)
        startup.begin("prepare")

    def _wait(self, stop: StopRequest) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        for compiling in self._processes:
            process, errors = compiling.process, compiling.errors
            while process.poll() is None:
                stop.raise_if_requested("compiling")
                if time.monotonic() > deadline:
                    process.kill()
                    errors.write(f"not done {PATIENCE_SECONDS:g} s after the run needed it".encode())
                time.sleep(POLL_SECONDS)
            atexit.unregister(process.kill)
            if process.returncode:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                reason = said[-1] if said else f"exit code {process.returncode}"
                log.info("not compiled ahead, the first steps take longer: %s", reason)


def _mark(settings: Settings, device: torch.device, program: str) -> Path:
    """The file that says that a program of such a run is in the compiler's cache."""
    fields = repr([getattr(settings, name) for name in FIELDS])
    of = program, str(settings.model), fields, torch.__version__, torch.cuda.get_device_name(device), _sources()
    return Path(os.environ[CACHE_VARIABLE]) / f"{MARK}{digest_of(*of)[:16]}"


@functools.cache
def _sources() -> str:
    """What the network's and the kernels' own files last said: other code makes other programs."""
    import sa3dist_kernels

    folders = Path(__file__).parents[1] / "model", Path(sa3dist_kernels.__file__).parent
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return digest_of(*(path.read_bytes() for path in files))


def small_base(config: ModelConfig, settings: Settings, device: torch.device, dtype: torch.dtype) -> Base:
    """Random weights in the run's format, with the run's adapter."""
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, depth=BLOCKS))
    base = Base(config, RandomWeights(config, 0, device), device, dtype, text_source=None, encoder=False)
    base.reference_numerics = settings.reference_numerics
    given = {name: getattr(settings, name) for name in ("adapter_type", "rank", "alpha", "include", "exclude", "seed")}
    attach_adapter(base, **given)
    return base


def take_passes(base: Base, settings: Settings, backend, has_context: bool) -> None:
    """Forward and backward passes of short and long clips, with given context or without.

    backend   of torch.compile
    """
    longest = longest_frames(base, settings)
    if settings.adapter_products == "auto":
        if obstacle := obstacle_to(base.device, product_format(base, settings)):
            raise SA3DistError(f"adapted weights are not formed here: {obstacle}")
        # Without the trial of kernels that no pass runs.
        settings = settings.model_copy(update={"adapter_products": "formed"})
    engine = engine_of(base, settings)
    compile_whole_blocks(base, settings, backend)
    ladder = ShapeLadder(longest, base.dit.transformer.memory)
    # The longest first: but for a deterministic run the compiler chooses its tiles by the first it sees.
    for frames in sorted({min(SHORT_FRAMES, longest), longest}, reverse=True):
        batch = dataclasses.replace(_batch(base, settings, frames), has_context=has_context)
        # Whatever values W' has.
        engine.flat.zero()
        engine.backward(engine.losses(ladder(batch.to(base.device)))["loss"], last=False)


def form_and_finish(base: Base, settings: Settings) -> None:
    """What forms weights and finishes gradients, and their trial."""
    engine = engine_of(base, settings)
    engine.zero()
    engine.average()


def engine_of(base: Base, settings: Settings) -> FlatEngine:
    """As a run's. Raises SA3DistError where adapted weights are not formed."""
    forward = functools.partial(micro_batch_loss, base, settings=settings)
    parameters = adapter_parameters(base)
    flat = FlatAdapters(parameters, settings.learning_rate, settings.weight_decay, scalars=0)
    engine = FlatEngine(base, parameters, flat, forward, settings, Group(0, 1, base.device))
    if engine.formed is None:
        raise SA3DistError("adapted weights are not formed here")
    return engine


def _batch(base: Base, settings: Settings, frames: int):
    """A micro batch of clips of this many frames, of unequal lengths where it has several."""
    tokens = base.prompt_tokens
    hidden_LH, mask_L = torch.zeros(tokens, base.config.cond_dim), torch.arange(tokens) < 8
    samples = [
        Sample(
            slot=slot,
            clip="",
            latents_DT=torch.randn(base.latent_channels, frames),
            frames=max(1, frames - slot),
            seconds_total=1.0,
            hidden_LH=hidden_LH,
            prompt_mask_L=mask_L,
            dropped=False,
            silent=False,
            effective_frames=frames,
        )
        for slot in range(settings.batch_size)
    ]
    return collate(samples, SampleSettings(0, settings.batch_size, frames, 0.0, "crop", None))


def main(program: str) -> None:
    # A run that is killed cannot end it, and the next start needs the device's memory.
    end_with_parent()
    cuda_driver.start()
    if program != KERNELS:
        # They compile blocks' kernels side by side, but seconds pass until they can: until then it is done one by one.
        start_compile_workers()
        importlib.import_module("torch._inductor.compile_fx")
    # Said once all is imported that is needed whatever it is.
    given = sys.stdin.buffer.read()
    if not given:
        return
    settings, device, dtype = pickle.loads(given)
    if settings.deterministic:
        make_deterministic()
    base = small_base(known_config(settings.model), settings, device, dtype)
    if program == KERNELS:
        form_and_finish(base, settings)
    else:
        take_passes(base, settings, "inductor", has_context=program == CONTEXT)
    _mark(settings, device, program).touch()


if __name__ == "__main__":
    # Searching what a compiler makes for garbage takes a tenth of the time; kept, it is some ten MB of a short life.
    gc.disable()
    main(sys.argv[1])
