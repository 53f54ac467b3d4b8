"""The clips that previews are compared with, and the search in them, by mel frames and by SAME's latents.

Legend: C channels, N samples, D latent channels or bands, T frames.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sa3dist.data.batches.batch_source import BatchSource
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.crops import EncodedCrops
from sa3dist.data.latents.source import LatentDataset
from sa3dist.flow.crops import SILENCE_PEAK
from sa3dist.formats import ClipEntry
from sa3dist.listening.copying import View, row_of
from sa3dist.listening.nearest import RANGE_DB, WINDOW_SECONDS, Match, mel_frames, nearest, windows_of, without_silence

# More held-out clips than this would add little.
MOST_HELD_OUT = 32
# A compared sound may begin anywhere in a frame: try this many shifts within one.
MEL_PARTS, LATENT_PARTS = 4, 2
# The average spectrum, subtracted from all, is taken over at most this many clips.
MOST_AVERAGED = 64


@dataclasses.dataclass(frozen=True)
class Sound:
    """A preview or a held-out clip to look for.

    audio      returns its samples, float32 (C, N); None = no audio
    latents    of its variants, float32 (D, T) each; empty = none
    """

    audio: Callable[[], np.ndarray] | None
    latents: Sequence[np.ndarray] = ()


@dataclasses.dataclass(frozen=True)
class Job:
    """The previews of one step, by number."""

    step: int
    sounds: dict[int, Sound]


class Search:
    """Searches the training clips for previews. Calls ``check`` between clips; what it raises ends the search.

    After the first call it holds the mel frames of all training clips, 0.7 KB per second of audio, but no latents.
    """

    def __init__(self, source: BatchSource, preview_frames: int, check: Callable[[], None]) -> None:
        encoded = source.encoded
        self.encoded, self.held_encoded = encoded, source.held_encoded
        self.clips, self.check = source.index.clips, check
        self.rate, self.hop = encoded.sample_rate_hz, encoded.samples_per_frame
        self.has_audio = not any(isinstance(clips.index, LatentDataset) for clips in (encoded, self.held_encoded))
        self.has_latents = not isinstance(encoded, EncodedCrops)
        step = max(1, -(-len(source.held_out) // MOST_HELD_OUT))
        # Without audio, those that are encoded; of a separate data set maybe not all.
        self.held_out: Sequence[ClipEntry] = [
            clip
            for clip in source.held_out[::step]
            if self.has_audio or any(self.held_encoded.has_latents(clip, flipped) for flipped in (False, True))
        ]
        self.preview_frames = preview_frames
        self.window = max(2, min(preview_frames, round(WINDOW_SECONDS * self.rate / self.hop)))
        self._frames: list[tuple[str, np.ndarray]] = []
        self._latent_centre_D1: np.ndarray | None = None
        self._null: dict[str, list[float]] = {}

    def excerpt(self, clip: ClipEntry) -> np.ndarray:
        """The middle of a clip, as long as a preview: float32 (C, N)."""
        audio_CN, samples = self.held_encoded.audio(clip).numpy(), self.preview_frames * self.hop
        begin = max(0, audio_CN.shape[1] - samples) // 2
        return audio_CN[:, begin : begin + samples]

    def rows(self, jobs: Sequence[Job], held_out: Sequence[Sound]) -> Iterator[dict[str, Any]]:
        """The rows of ``copies.jsonl`` for some steps, from one pass over the clips. held_out: their sounds."""
        sounds = [sound for job in jobs for sound in job.sounds.values()]
        matches_of = {}
        if self.has_audio:
            matches_of["mel"] = self._by_mel(sounds, held_out)
        if self.has_latents and all(len(sound.latents) for sound in (*sounds, *held_out)):
            matches_of["latent"] = self._by_latents(sounds, held_out)
        begin = 0
        for job in jobs:
            mine = slice(begin, begin := begin + len(job.sounds))
            views = {name: View(self._null[name], matches[mine]) for name, matches in matches_of.items()}
            yield row_of(job.step, list(job.sounds), views, len(held_out), self.hop / self.rate)

    def _by_mel(self, sounds: Sequence[Sound], held_out: Sequence[Sound]) -> list[Match]:
        if not self._frames:
            frames = []
            for clip in self.clips:
                self.check()
                audio_CN = self.encoded.audio(clip).numpy()
                frames.append((clip.key, mel_frames(audio_CN, self.rate, self.hop).astype(np.float16)))
            averaged = [frames_DT for _, frames_DT in frames[:: -(-len(frames) // MOST_AVERAGED)]]
            self._centre_D1 = np.concatenate(averaged, axis=1).astype(np.float32).mean(axis=1, keepdims=True)
            self._frames = frames
        return self._matches("mel", self._mel_windows, sounds, held_out, self._mel_clips)

    def _mel_windows(self, sound: Sound) -> np.ndarray:
        self.check()
        audio_CN = sound.audio()
        parts = [part * self.hop // MEL_PARTS for part in range(MEL_PARTS)]
        variants = [mel_frames(audio_CN, self.rate, self.hop, part) for part in parts if part < audio_CN.shape[1]]
        if np.abs(audio_CN).max() < SILENCE_PEAK:
            variants = [np.zeros_like(frames_DT) for frames_DT in variants]
        return windows_of(list(map(self._centred, variants)), self.window)

    def _mel_clips(self) -> Iterator[tuple[str, np.ndarray]]:
        for key, frames_DT in self._frames:
            self.check()
            yield key, self._centred(frames_DT.astype(np.float32))

    def _centred(self, frames_DT: np.ndarray) -> np.ndarray:
        """Minus the average spectrum of the clips; frames at the lowest level throughout count as silent."""
        return without_silence(frames_DT - self._centre_D1, frames_DT.max(axis=0) > frames_DT.max() - RANGE_DB + 3)

    def _by_latents(self, sounds: Sequence[Sound], held_out: Sequence[Sound]) -> list[Match]:
        if self._latent_centre_D1 is None:
            few = self.clips[:: -(-len(self.clips) // MOST_AVERAGED)]
            averaged = [frames_DT for _, frames_DT in self._stored(few)]
            self._latent_centre_D1 = np.concatenate(averaged, axis=1).mean(axis=1, keepdims=True)

        def windows(sound: Sound) -> np.ndarray:
            return windows_of(list(map(self._centred_latents, sound.latents)), self.window)

        def clips() -> Iterator[tuple[str, np.ndarray]]:
            return ((key, self._centred_latents(frames_DT)) for key, frames_DT in self._stored(self.clips))

        return self._matches("latent", windows, sounds, held_out, clips)

    def _centred_latents(self, frames_DT: np.ndarray) -> np.ndarray:
        """Minus the average of the clips, but zero where nothing sounds."""
        return without_silence(frames_DT - self._latent_centre_D1, frames_DT.any(axis=0))

    def _stored(self, clips: Sequence[ClipEntry]) -> Iterator[tuple[str, np.ndarray]]:
        for clip in clips:
            self.check()
            # With encoding on first use a clip may exist in one polarity or none; sounds have both.
            for flipped in (False, True):
                if self.encoded.has_latents(clip, flipped):
                    yield clip.key, stored(self.encoded, clip, flipped)
                    break

    def _matches(
        self,
        view: str,
        windows: Callable[[Sound], np.ndarray],
        sounds: Sequence[Sound],
        held_out: Sequence[Sound],
        clips: Callable[[], Iterator[tuple[str, np.ndarray]]],
    ) -> list[Match]:
        """Matches of ``sounds``; those of held-out clips are computed the first time."""
        new = [] if view in self._null else held_out
        matches = nearest([windows(sound) for sound in (*new, *sounds)], clips())
        if view not in self._null:
            self._null[view] = [match.distance for match in matches[: len(new)]]
        return matches[len(new) :]


def stored(encoded: EncodedClips, clip: ClipEntry, flipped: bool) -> np.ndarray:
    """The latents of an encoded clip, float32 (D, T)."""
    latents = encoded.latents(clip, flipped)
    latents_DT = latents.latents_DT[:, : latents.valid_frames].numpy()
    return without_silence(latents_DT, latents.peaks_T.numpy() >= SILENCE_PEAK)


def read_preview(path: Path) -> np.ndarray:
    """float32 (C, N)."""
    import soundfile

    return np.ascontiguousarray(soundfile.read(path, dtype="float32", always_2d=True)[0].T)
