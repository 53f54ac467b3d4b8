"""A GPU run's programs and kernels, compiled by other processes while the base is loaded and clips are encoded.

Each process makes a base of random weights with two blocks: all blocks run the same programs. It compiles into the
caches of ``work_dir``, where the run finds the programs at its first step. Two processes take a few passes each: micro
batches with and without given context have a program each. The third forms weights and finishes gradients, which is
done outside of passes. One after another they would take three times as long as the time they hide in.

    python -m sa3dist.training.compile_ahead context|none|kernels < pickled settings (nothing: end)
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
from sa3dist.adapters.formed import product_dtype
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
# The kernels for few tokens differ from those for many.
SHORT_FRAMES = 128
# Settings that the programs depend on beside the model. The number of recomputed blocks changes no program.
FIELDS = (
    "adapter_type", "rank", "alpha", "include", "exclude", "base_precision", "mixed_precision", "adapter_products",
    "batch_size", "duration", "compile", "reference_numerics", "deterministic",
)  # fmt: skip
# A start waits at most this long; then the run compiles the rest itself.
PATIENCE_SECONDS = 30.0
POLL_SECONDS = 0.1


class CompilingAhead:
    """The compiling processes of this run, if it needs any."""

    def __init__(
        self, settings: Settings, group: Group, dtype: torch.dtype, started: dict[str, Compiling] | None = None
    ) -> None:
        """Call on every rank before the base is loaded, once the cache directories are set. Failures are only logged.

        dtype     of the base's weights
        started   processes waiting for work, by program; those that are used are removed
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
        """Return on every rank when all processes have ended and freed their device memory; counted as a startup part.

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
    """The file that marks a program of such a run as cached."""
    fields = repr([getattr(settings, name) for name in FIELDS])
    of = program, str(settings.model), fields, torch.__version__, torch.cuda.get_device_name(device), _sources()
    return Path(os.environ[CACHE_VARIABLE]) / f"{MARK}{digest_of(*of)[:16]}"


@functools.cache
def _sources() -> str:
    """Digest of the network's and the kernels' source files: other code makes other programs."""
    import sa3dist_kernels

    folders = Path(__file__).parents[1] / "model", Path(sa3dist_kernels.__file__).parent
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return digest_of(*(path.read_bytes() for path in files))


def small_base(config: ModelConfig, settings: Settings, device: torch.device, dtype: torch.dtype) -> Base:
    """Random weights in the run's dtype, with the run's adapter."""
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, depth=BLOCKS))
    base = Base(config, RandomWeights(config, 0, device), device, dtype, text_source=None, encoder=False)
    base.reference_numerics = settings.reference_numerics
    given = {name: getattr(settings, name) for name in ("adapter_type", "rank", "alpha", "include", "exclude", "seed")}
    attach_adapter(base, **given)
    return base


def take_passes(base: Base, settings: Settings, backend, has_context: bool) -> None:
    """Forward and backward passes of short and long clips, with or without given context.

    backend   of torch.compile
    """
    longest = longest_frames(base, settings)
    if settings.adapter_products == "auto":
        if obstacle := obstacle_to(base.device, product_dtype(base, settings)):
            raise SA3DistError(f"adapted weights are not formed here: {obstacle}")
        # "formed" skips the trial of kernels that no pass runs.
        settings = settings.model_copy(update={"adapter_products": "formed"})
    engine = engine_of(base, settings)
    compile_whole_blocks(base, settings, backend)
    ladder = ShapeLadder(longest, base.dit.transformer.memory)
    # Longest first: unless the run is deterministic, the compiler chooses tiles by the first shape it sees.
    for frames in sorted({min(SHORT_FRAMES, longest), longest}, reverse=True):
        batch = dataclasses.replace(_batch(base, settings, frames), has_context=has_context)
        # W' may have any values here.
        engine.flat.zero()
        engine.backward(engine.losses(ladder(batch.to(base.device)))["loss"], last=False)


def form_and_finish(base: Base, settings: Settings) -> None:
    """Compile the kernels that form weights and finish gradients, and their trial."""
    engine = engine_of(base, settings)
    engine.zero()
    engine.average()


def engine_of(base: Base, settings: Settings) -> FlatEngine:
    """An engine like the run's. Raises SA3DistError where adapted weights are not formed."""
    forward = functools.partial(micro_batch_loss, base, settings=settings)
    parameters = adapter_parameters(base)
    flat = FlatAdapters(parameters, settings.learning_rate, settings.weight_decay, scalars=0)
    engine = FlatEngine(base, parameters, flat, forward, settings, Group(0, 1, base.device))
    if engine.formed is None:
        raise SA3DistError("adapted weights are not formed here")
    return engine


def _batch(base: Base, settings: Settings, frames: int):
    """A micro batch of clips with this many frames, each clip one frame shorter than the one before."""
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
    # A killed run cannot end this process, and the next start needs the device's memory.
    end_with_parent()
    cuda_driver.start()
    if program != KERNELS:
        # Workers compile the blocks' kernels in parallel, but need seconds to start; until then compiling is serial.
        start_compile_workers()
        importlib.import_module("torch._inductor.compile_fx")
    # Read only after the imports, which are needed in any case.
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
    # Garbage collection of the compiler's objects takes a tenth of the time; without it they cost some ten MB.
    gc.disable()
    main(sys.argv[1])
