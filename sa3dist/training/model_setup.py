"""The frozen base a run trains on, with fresh or warm-started adapters, opened on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sa3dist_kernels import ADAPTER_TYPES

from sa3dist import adapters
from sa3dist.data.remote.fetch import fetch, is_remote, redacted
from sa3dist.data.remote.local_paths import local_name
from sa3dist.errors import CheckpointError
from sa3dist.formats import digest_of, file_sha256
from sa3dist.model.compiled import keep_compiled_in, start_compile_workers, wants_compile
from sa3dist.model.config import ModelConfig
from sa3dist.model.digest_cache import DigestCache
from sa3dist.model.loading import load_base
from sa3dist.progress import progress
from sa3dist.runtime.lasting_imports import lasting_imports
from sa3dist.runtime.process_group import Group, main_process_first, run_on_all_ranks
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.compile_ahead import CompilingAhead
from sa3dist.training.startup_times import Startup, imported_beside, keep_kernels_in, libraries_beside

if TYPE_CHECKING:
    from sa3dist.model.base import Base
    from sa3dist.settings import Settings
    from sa3dist.training.compile_processes import Compiling

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def begin_compiling(settings: Settings, group: Group, started: dict[str, Compiling]) -> CompilingAhead:
    """Start compiling what a GPU will run; call it before anything else. started: as in ``CompilingAhead``."""
    _keep_caches(settings, group)
    return CompilingAhead(settings, group, DTYPES[settings.base_precision], started)


def _keep_caches(settings: Settings, group: Group) -> bool:
    """Set the compilers' cache directories before they compile anything. Returns whether this run compiles."""
    if group.device.type == "cuda":
        keep_kernels_in(settings.work_dir.resolve() / "kernels")
    compiles = wants_compile(settings.compile, group.device, settings.number_of_steps)
    if compiles:
        keep_compiled_in(settings.work_dir.resolve() / "compiled")
    return compiles


def open_base(
    settings: Settings, group: Group, stop: StopRequest, startup: Startup, known_warm_start: str | None
) -> tuple[Base, str | None]:
    """The base with its adapters, and the digest of the adapter file they start from (None for fresh ones).

    known_warm_start   that digest, if a checkpoint will replace the file's values: the file is then not read
    If one rank fails to load, to find singular bases or to attach, all ranks raise its error. Raises ConfigError when
    told to compile without a compiler.
    """
    on_gpu = group.device.type == "cuda"
    compiles = _keep_caches(settings, group)
    startup.begin("load_base")
    # Both imports take four seconds, hidden behind the reading of the base.
    compiler = ["torch._dynamo", "torch._inductor.compile_fx"] if compiles and on_gpu else []
    with lasting_imports(), imported_beside(*compiler), libraries_beside(group.device):
        base = run_on_all_ranks(group, "base", lambda: _load(settings, group.device), stop)
        # Startup part "compiler": the rest of the imports after the reading, and starting the workers.
        startup.begin("compiler")
        if group.is_main:
            # Threads hash while imports finish, bases are found and clips are checked.
            base.begin_digests()
    if compiler:
        start_compile_workers()
    startup.begin("singular_bases")
    bases = _singular_bases(settings, group, stop, base)
    startup.begin("attach")
    run_on_all_ranks(group, "attach", lambda: _attach(settings, base, bases), stop)
    if settings.lora_checkpoint_url and known_warm_start is None:
        known_warm_start = run_on_all_ranks(group, "start-warm", lambda: _start_warm(settings, group, stop, base), stop)
    return base, known_warm_start


def _load(settings: Settings, device: torch.device) -> Base:
    # TF32 convolutions in cuDNN would round float32 latents to ten bits of mantissa.
    torch.backends.cudnn.allow_tf32 = False
    base = load_base(
        settings.model,
        device,
        DTYPES[settings.base_precision],
        text_encoder=settings.text_encoder,
        # Loaded on first use: a run whose latents are all on disk never needs it.
        encoder=False,
    )
    _require_trainable(base.config)
    base.reference_numerics = settings.reference_numerics
    base.digest_cache = DigestCache(settings.work_dir / "digests", settings.verify_base)
    return base


def _require_trainable(config: ModelConfig) -> None:
    for key in ("mask_padding_attention", "use_effective_length_for_schedule"):
        if not getattr(config, key):
            raise CheckpointError(
                f"{config.source}: model.diffusion.{key} is false or absent; only models made with it can be "
                f"trained here, as all released bases are"
            )


def _singular_bases(settings: Settings, group: Group, stop: StopRequest, base: Base) -> adapters.BasesCache | None:
    """The cache of singular bases for -xs types, None for others. Each rank computes its share of the missing ones."""
    if not ADAPTER_TYPES[settings.adapter_type].xs:
        return None
    digest = main_process_first(group, "digest-for-bases", base.weights_digest, stop)
    cache = adapters.BasesCache(settings.work_dir / "singular_bases", digest, group.device)
    names = adapters.select(adapters.candidate_layers(base.adapter_roots), settings.include, settings.exclude)

    def find() -> None:
        mine = names[group.dist_rank :: group.world_size]
        with progress("singular bases", len(mine), shown=group.is_main) as update:
            for done, name in enumerate(mine, start=1):
                group.liveness.progress()
                stop.raise_if_requested("finding singular bases")
                cache(name, base.fp32_weight(name).flatten(1), settings.rank)
                update(done)

    run_on_all_ranks(group, "singular-bases", find, stop)
    return cache


def _attach(settings: Settings, base: Base, bases: adapters.BasesCache | None) -> None:
    adapters.attach_adapter(
        base,
        adapter_type=settings.adapter_type,
        rank=settings.rank,
        alpha=settings.alpha,
        include=settings.include,
        exclude=settings.exclude,
        seed=settings.seed,
        bases=bases,
    )


def _start_warm(settings: Settings, group: Group, stop: StopRequest, base: Base) -> str:
    """Give the adapters the values of ``lora_checkpoint_url``. Returns the file's digest."""
    should_stop = group.liveness.counting(stop.requested)
    url, downloads = settings.lora_checkpoint_url, settings.work_dir / "downloads"
    path = main_process_first(
        group,
        "warm-start",
        lambda: str(fetch(url, downloads, should_stop)) if is_remote(url) else local_name(url),
        stop,
    )
    try:
        adapters.warm_start(base, path)
    except CheckpointError as error:
        # Name the address that the user gave, not the downloaded file.
        raise CheckpointError(str(error).replace(path, redacted(url))) from error
    return _digest(Path(path))


def _digest(path: Path) -> str:
    """Digest of a file's bytes, or of all files of a PEFT folder."""
    if path.is_file():
        return file_sha256(path)
    return digest_of(*(file_sha256(file) for file in sorted(path.rglob("*")) if file.is_file()))
