"""Clips for the training loop that were never audio: latents and prompt features drawn in memory."""

from __future__ import annotations

import torch

from sa3dist.data.latents.cache import SILENCE_TAIL_FRAMES, ClipLatents
from sa3dist.formats import ClipEntry
from sa3dist.model.conditioners import HIDDEN_WIDTH

CAPTION_TOKENS = 12


class SyntheticClips:
    """What ``MicroBatches`` reads of ``EncodedClips``: clips of 0.8 to 1.2 times ``frames``, always the same."""

    def __init__(self, base, count: int, frames: int) -> None:
        self.sample_rate_hz: int = base.sample_rate_hz
        self.samples_per_frame: int = base.samples_per_frame
        self._prompt_tokens: int = base.prompt_tokens
        self._channels: int = base.latent_channels
        self.clips = [self._clip(i, round(frames * (0.8 + 0.4 * i / count))) for i in range(count)]

    def _clip(self, number: int, frames: int) -> ClipEntry:
        name = f"clip-{number:03}"
        samples, rate = frames * self.samples_per_frame, self.sample_rate_hz
        return ClipEntry(name, "nowhere.tar", 0, 0, name, "wav", samples, rate, 2, f"caption of {name}")

    def latents(self, clip: ClipEntry, flipped: bool) -> ClipLatents:
        """A slow random walk through the latent space, so that neighbouring frames are alike as in real latents."""
        frames = clip.samples // self.samples_per_frame
        generator = torch.Generator().manual_seed(self._number(clip.key))
        steps_DT = torch.randn(self._channels, frames + SILENCE_TAIL_FRAMES, generator=generator)
        latents_DT = torch.cumsum(steps_DT, dim=1) / torch.arange(1, steps_DT.shape[1] + 1).sqrt()
        sign = -1 if flipped else 1
        return ClipLatents(sign * latents_DT, torch.zeros(self._channels, 2), torch.ones(frames))

    def prompt(self, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (L, 768) and mask (L,)."""
        generator = torch.Generator().manual_seed(self._number(caption))
        hidden_LH = torch.zeros(self._prompt_tokens, HIDDEN_WIDTH)
        hidden_LH[:CAPTION_TOKENS] = torch.randn(CAPTION_TOKENS, HIDDEN_WIDTH, generator=generator)
        return hidden_LH, torch.arange(self._prompt_tokens) < CAPTION_TOKENS

    @staticmethod
    def _number(text: str) -> int:
        return int(text.rpartition("-")[2])
