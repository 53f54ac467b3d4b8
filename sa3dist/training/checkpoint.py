"""Training checkpoints: adapters, moments and the step; safetensors and JSON, never pickle, never the base."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from sa3dist.errors import CheckpointError, DamagedCheckpoint
from sa3dist.formats import atomic_directory, file_sha256, write_whole
from sa3dist.parallel.flat_adamw import MOMENTS
from sa3dist.runtime import lease
from sa3dist.runtime.launcher import batch_job

log = logging.getLogger(__name__)

STATE_NAME = "state.json"
ADAPTER_NAME = "adapter.safetensors"
MOMENTS_NAME = "moments.safetensors"
CHECKPOINT_VERSION = 2
# Errors of reading that another attempt will meet too. None: not of the system, of safetensors.
DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, None}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One saved state.

    adapters   float32 adapter tensors by their name in the adapter file
    moments    AdamW's state by kind, {"exp_avg": {...}, "exp_avg_sq": {...}}, float32, same names
    state      JSON values: step, seed, micro and global batch, lora_config, base and dataset digests, versions
    directory  where it was read
    """

    adapters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    directory: Path | None = None

    @property
    def step(self) -> int:
        return self.state["step"]

    def require(self, names: Collection[str]) -> None:
        """Raises CheckpointError unless it holds exactly these adapter tensors, and AdamW's moments of all of them."""
        if differing := set(names) ^ self.adapters.keys():
            raise CheckpointError(
                f"checkpoint of step {self.step}: its layers differ from this run's, e.g. {min(differing)}"
            )
        for moment in MOMENTS:
            if lacking := set(names) - self.moments.get(moment, {}).keys():
                raise CheckpointError(
                    f"checkpoint of step {self.step}: it lacks AdamW's {moment} of {min(lacking)}; continue from "
                    f"another one, or give its adapter.safetensors as lora_checkpoint_url of a new run"
                )


def path_of(output_dir: Path, step: int) -> Path:
    return Path(output_dir) / "checkpoints" / f"step-{step:08d}"


def save(output_dir: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Publish a checkpoint by rename after fsync, then delete all but the newest ``keep``. Returns its directory.

    Checkpoints of later steps are deleted too: they are damaged, or belong to a course this run has left.
    """
    target = path_of(output_dir, checkpoint.step)
    for leftover in target.parent.glob(".step-*"):
        # Left by a killed save: only this process writes here.
        shutil.rmtree(leftover)
    moments = {f"{moment}/{name}": t for moment, means in checkpoint.moments.items() for name, t in means.items()}
    try:
        with atomic_directory(target) as temporary:
            # Written by Python, not by safetensors: a full disk is then an OSError that names the file.
            for name, tensors in ((ADAPTER_NAME, checkpoint.adapters), (MOMENTS_NAME, moments)):
                write_whole(temporary / name, serialize(tensors))
            digests = {name: file_sha256(temporary / name) for name in (ADAPTER_NAME, MOMENTS_NAME)}
            body = {"version": CHECKPOINT_VERSION, "job": batch_job(), **checkpoint.state, "files": digests}
            write_whole(temporary / STATE_NAME, json.dumps({**body, "digest": _digest_of_state(body)}, indent=2))
            lease.end_if_over()
    except OSError as error:
        # The error of a failed write, unlike that of a failed open, names no file.
        error.filename = error.filename or str(target)
        raise
    everything = list_all(output_dir)
    position = everything.index(target)
    for stale in everything[:position] + everything[position + keep :]:
        shutil.rmtree(stale)
    return target


def set_aside(output_dir: Path, step: int) -> None:
    """Move checkpoints and previews of steps after ``step`` to ``checkpoints-aside`` and ``previews-aside``; log it.

    A run that starts over, or from an earlier step, would otherwise later continue from another course's end.
    """
    later = [path for path in list_all(output_dir) if _step_of(path) > step]
    for path in later:
        log.warning("set aside %s: this run takes another course from step %d on", path, step)
    previews = Path(output_dir).glob("previews/step-" + "[0-9]" * 8)
    for path in [*later, *(path for path in previews if later and _step_of(path) > step)]:
        aside = Path(output_dir) / f"{path.parent.name}-aside" / path.name
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_all(output_dir: Path) -> list[Path]:
    """Checkpoint directories, newest first, intact or not."""
    return sorted((Path(output_dir) / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


def load(directory: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises DamagedCheckpoint, naming the file, when anything is missing or damaged; CheckpointError when another version
    of this program wrote it, or it may not be read; OSError when the system cannot read it now.
    """
    directory = Path(directory)
    # exists() is also False for a name that is too long; reading would raise.
    if not os.path.exists(directory / STATE_NAME):
        example = path_of(Path("RUN"), 500)
        raise DamagedCheckpoint(f"{directory}: no {STATE_NAME} in it, expected a folder such as {example}")
    try:
        state = json.loads((directory / STATE_NAME).read_text(encoding="utf-8"))
        digest, files = state.pop("digest"), state["files"]
        if _digest_of_state(state) != digest:
            raise DamagedCheckpoint(f"{directory / STATE_NAME}: content does not match its digest")
        if state["version"] != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"{directory}: checkpoint version {state['version']}, expected {CHECKPOINT_VERSION}; continue with the "
                f"version of sa3dist that wrote it, use another output_dir, or resume=never to start over"
            )
        for name, expected in files.items():
            if file_sha256(directory / name) != expected:
                raise DamagedCheckpoint(f"{directory / name}: content does not match its digest")
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(directory / MOMENTS_NAME).items():
            moment, _, name = key.partition("/")
            moments.setdefault(moment, {})[name] = tensor
        return Checkpoint(load_file(directory / ADAPTER_NAME), moments, state, directory)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename}: may not be read ({error.strerror}); check its permissions") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        # A system that cannot open files now, say, has not damaged it: skipping it would lose its steps.
        if isinstance(error, OSError) and error.errno not in DAMAGE:
            raise
        raise DamagedCheckpoint(f"{directory}: not a readable checkpoint ({type(error).__name__}: {error})") from error


def find(output_dir: Path, resume: str, job: str | None = None) -> Checkpoint | None:
    """The checkpoint a run continues from.

    resume   "never": none; "auto": the newest intact one in output_dir, with a warning for each damaged one skipped;
             else a checkpoint directory, which must be intact
    job      batch job of which this is another start: its own newest intact one, if there is one, goes before
             ``resume``, which was meant for the first start
    Raises as ``load``, but for a damaged one only where ``resume`` names it.
    """
    if resume == "auto" or job is not None:
        for directory in list_all(output_dir):
            try:
                saved = load(directory)
            except DamagedCheckpoint as damage:
                log.warning("skipping a damaged checkpoint: %s", damage)
            else:
                if resume == "auto" or saved.state.get("job") == job:
                    return saved
    return None if resume in ("auto", "never") else load(Path(resume))


def _digest_of_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


class Saver:
    """Runs saves in a thread, one at a time. Their errors are raised at the next ``check`` or ``wait``.

    seconds   duration of the last save
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        # The interpreter waits for this thread at exit, so a save is finished, rename included.
        self._executor = ThreadPoolExecutor(1, "save")
        self._save: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._save is not None and not self._save.done()

    def start(self, write: Callable[[], None], done: Callable[[], None]) -> None:
        """Run ``write``, then ``done`` even if it failed, in the background. First waits for a save in flight."""
        self.wait()
        self._save = self._executor.submit(self._run, write, done)

    def _run(self, write: Callable[[], None], done: Callable[[], None]) -> None:
        begin = time.perf_counter()
        try:
            write()
        finally:
            self.seconds = time.perf_counter() - begin
            done()

    def check(self) -> None:
        """Raise the error of a failed save, once."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait until no save is in flight; raises the error of the last one."""
        save, self._save = self._save, None
        if save is not None:
            save.result()

    def close(self) -> None:
        """Finish a save in flight when the run ends for another reason; its error is only logged."""
        try:
            self.wait()
        except Exception as failure:
            log.error("a save failed as well: %s", failure)
