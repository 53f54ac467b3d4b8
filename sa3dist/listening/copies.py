"""Check a run's previews for copies of training clips: encode them when made, search beside the training."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sa3dist.cost_model.devices import free_bytes
from sa3dist.data.latents.cache import frame_peaks
from sa3dist.data.latents.source import StreamedDataset
from sa3dist.errors import Interrupted
from sa3dist.flow.crops import SILENCE_PEAK
from sa3dist.listening.copy_search import LATENT_PARTS, Job, Search, Sound, read_preview, stored
from sa3dist.listening.nearest import without_silence
from sa3dist.model.base import AUTOENCODER_PREFIX
from sa3dist.model.generation import borrowed_encoders
from sa3dist.training.memory import USABLE_SHARE
from sa3dist.training.metrics import RowsFile
from sa3dist.training.observers import Observation, Observer

if TYPE_CHECKING:
    from sa3dist.data.batches.batch_source import BatchSource
    from sa3dist.formats import ClipEntry
    from sa3dist.listening.previews import Previews
    from sa3dist.runtime.signals import StopRequest
    from sa3dist.settings import Settings

log = logging.getLogger(__name__)

COPIES_NAME = "copies.jsonl"
ENCODER = f"{AUTOENCODER_PREFIX}encoder."


def of_run(settings: Settings, previews: Previews | None, source: BatchSource, step: int) -> Copies | None:
    """The copy check that ``settings`` ask for; None = none. step: the training continues from there."""
    if previews is None or not settings.copy_check:
        return None
    if isinstance(source.index, StreamedDataset):
        if previews.group.is_main:
            log.info("copies: left out, the clips of a stream are not known")
        return None
    return Copies(previews, source, step)


class Copies(Observer):
    """Writes a row of ``output_dir/copies.jsonl`` for the previews of every step, on rank 0.

    Previews are encoded between two steps, on the training's device; a thread then searches. Only the end of the run
    waits for it.
    """

    name = "copies"

    def __init__(self, previews: Previews, source: BatchSource, step: int) -> None:
        """step: rows of later steps are dropped."""
        self.previews, self.base, self.group = previews, previews.base, previews.group
        self._held_out: list[Sound] | None = None
        self._step, self._warned = step, False
        self._stop: StopRequest | None = None
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._no_more = self._abandoned = False
        self._thread: threading.Thread | None = None
        # Time of the search since it was last reported.
        self._seconds = 0.0
        if self.group.is_main:
            self.file = RowsFile(Path(previews.output_dir) / COPIES_NAME, step)
            frames = math.ceil(previews.how.samples(self.base.config) / self.base.samples_per_frame)
            self.search = Search(source, frames, self._check)

    def begin(self, stop: StopRequest) -> Observation | None:
        self._stop = stop
        # A continued run keeps the base's previews, and so their row.
        return self._observe(0) if self._step == 0 else None

    def after_step(self, step: int, stop: StopRequest) -> Observation | None:
        observation = self._observe(step) if self.previews.steps.is_due(step) else None
        if self.group.is_main and self._thread is None and not self._no_more:
            # Started after the first step, so that loader processes are forked before there is another thread.
            self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
            self._thread.start()
        return observation

    def finish(self, early: bool) -> None:
        with self._changed:
            # After a signal or a failure nobody waits for the search.
            self._no_more, self._abandoned = True, early
            self._changed.notify()

    def close(self, until: float) -> None:
        """Wait for the search if it may end in time; results not found by then are not written."""
        if self._thread is not None:
            self._thread.join(0 if self._abandoned else max(0.0, until - time.monotonic()))
            if self._thread.is_alive() and not self._abandoned:
                log.warning("copies: not searched for to the end, the run is over before")
            self._abandoned = True
            # The thread checks between two clips.
            self._thread.join(1.0)

    def _observe(self, step: int) -> Observation | None:
        """Hand the previews of a step to the search."""
        if not self.group.is_main:
            return None
        begin = time.perf_counter()
        try:
            job = self._job(step)
            if job.sounds:
                with self._changed:
                    self._jobs.append(job)
                    self._changed.notify()
        except Exception as failure:
            self._report_failure(failure)
        seconds = time.perf_counter() - begin
        searched, self._seconds = self._seconds, 0.0
        return Observation(step, seconds, {"copies_seconds": seconds + searched})

    def _job(self, step: int) -> Job:
        """The existing previews of a step and, the first time, the held-out clips, with their latents."""
        search, folder = self.search, self.previews.folder(step)
        paths = {int(path.stem): path for path in folder.glob("*.flac")}
        with self._encoder() as encode:
            if self._held_out is None:
                self._held_out = [self._held_out_sound(clip, encode) for clip in search.held_out]
            sounds = {}
            for number, path in sorted(paths.items()):
                audio_CN = read_preview(path)
                sounds[number] = Sound(functools.partial(read_preview, path), encode(audio_CN) if encode else ())
        return Job(step, sounds)

    def _held_out_sound(self, clip: ClipEntry, encode: Callable[[np.ndarray], list[np.ndarray]] | None) -> Sound:
        search = self.search
        if search.has_audio:
            return Sound(functools.partial(search.excerpt, clip), encode(search.excerpt(clip)) if encode else ())
        encoded = search.held_encoded
        whole = [stored(encoded, clip, flipped) for flipped in (False, True) if encoded.has_latents(clip, flipped)]
        begin = max(0, whole[0].shape[1] - search.preview_frames) // 2
        return Sound(None, [frames_DT[:, begin : begin + search.preview_frames] for frames_DT in whole])

    @contextlib.contextmanager
    def _encoder(self) -> Iterator[Callable[[np.ndarray], list[np.ndarray]] | None]:
        """Yields a function that encodes the variants of a sound; None if latents are not used."""
        base, device = self.base, self.group.device
        if not self.search.has_latents:
            yield None
            return
        encoder = [math.prod(shape) for key, shape in base.weights.shapes.items() if key.startswith(ENCODER)]
        # Its float32 weights, and as much again to work with.
        if base.autoencoder.encoder is None and 8 * sum(encoder) > USABLE_SHARE * free_bytes(device):
            if not self._warned:
                log.warning("copies: compared without latents, the autoencoder does not fit into the free memory")
            self._warned = True
            yield None
            return
        with contextlib.ExitStack() as stack:
            if device.type == "cuda":
                # Give cached memory back for the next step.
                stack.callback(torch.cuda.empty_cache)
            stack.enter_context(borrowed_encoders(base))
            yield self._encode

    def _encode(self, audio_CN: np.ndarray) -> list[np.ndarray]:
        """Latents (D, T) of a sound, shifted by parts of a frame, in both polarities, as the training has them."""
        latents, size = [], self.base.samples_per_frame
        for part in range(LATENT_PARTS if self.search.has_audio else 1):
            shifted_CN = torch.from_numpy(audio_CN[:, part * size // LATENT_PARTS :])
            for sign in (1, -1):
                self.group.liveness.progress()
                self._stop.raise_if_requested("looking for copies")
                if shifted_CN.shape[1]:
                    latents_1DT = self.base.encode_audio((sign * shifted_CN)[None].to(self.group.device))
                    sounds_T = frame_peaks(shifted_CN, size).numpy() >= SILENCE_PEAK
                    latents.append(without_silence(latents_1DT[0].float().cpu().numpy(), sounds_T))
        return latents

    def _check(self) -> None:
        """Called between two clips: raises Interrupted if nobody waits for the result any more."""
        if self._abandoned:
            raise Interrupted("the run is over")
        self._stop.raise_if_requested("looking for copies")

    def _work(self) -> None:
        while jobs := self._next_jobs():
            begin = time.perf_counter()
            try:
                for row in self.search.rows(jobs, self._held_out):
                    self.file.write(row)
                    for warning in filter(None, (preview["warning"] for preview in row["previews"])):
                        log.warning("step %d: %s", row["step"], warning)
            except Interrupted:
                return
            except Exception as failure:
                self._report_failure(failure)
            self._seconds += time.perf_counter() - begin

    def _next_jobs(self) -> list[Job]:
        """All waiting jobs, for one pass over the clips; empty when no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._no_more)
            jobs, self._jobs = self._jobs, []
            return jobs

    def _report_failure(self, failure: Exception) -> None:
        """Log the first failure only, and no interruption: that ends the run."""
        if isinstance(failure, Interrupted):
            return
        if not self._warned:
            log.error(
                "copies: check failed: %s: %s; training goes on, further failures are not logged",
                type(failure).__name__,
                failure,
            )
        self._warned = True
