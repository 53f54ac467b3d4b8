"""Generates audio from prompts: seeded noise, the guided sampler in batches, decoding clip by clip.

Legend: B batch, C audio channels, N samples, D latent channels, T latent frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sa3dist.errors import ConfigError
from sa3dist.flow import draw_noise, generator_for
from sa3dist.model.sampling import Guidance, sample

if TYPE_CHECKING:
    from sa3dist.model.base import Base
    from sa3dist.model.config import ModelConfig

# Generated beyond the requested length and cut off: the model was trained on audio that fades into silence there.
# Source: the reference's generate.
HEADROOM_SECONDS = 6
BATCH = 4
# Usual are 50 steps and a scale of 7. A typing error must not run for days, or overflow.
MAX_STEPS = 20_000
MAX_CFG = 1000


@contextlib.contextmanager
def borrowed_encoders(base: Base) -> Iterator[None]:
    """Drop the text encoder and halves of SAME from memory at the end if they were loaded in this context."""
    parts = [(base, "text_encoder"), (base.autoencoder, "encoder"), (base.autoencoder, "decoder")]
    before = [getattr(owner, name) for owner, name in parts]
    try:
        yield
    finally:
        for (owner, name), part in zip(parts, before, strict=True):
            setattr(owner, name, part)


@dataclasses.dataclass(frozen=True)
class Generation:
    """How clips are generated; the defaults are those of the reference's training demos.

    seconds     length of each clip
    steps       evaluations of the network, each for both branches at once
    cfg_scale   guidance; 1 is without
    seed        of the noise, together with the clip's number
    """

    seconds: float
    steps: int = 50
    cfg_scale: float = 7.0
    seed: int = 0

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError for values the model does not support."""
        longest = config.sample_size / config.sample_rate_hz
        if not 0 < self.samples(config) / config.sample_rate_hz <= longest:
            raise ConfigError(f"seconds: {self.seconds} is out of range, this model makes up to {longest:.1f} s")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ConfigError(f"steps: {self.steps} is out of range, expected 1 to {MAX_STEPS}")
        if not abs(self.cfg_scale) <= MAX_CFG:
            raise ConfigError(f"cfg_scale: {self.cfg_scale} is out of range, expected a number up to {MAX_CFG}")

    def samples(self, config: ModelConfig) -> int:
        """Samples of a clip per channel."""
        return int(self.seconds * config.sample_rate_hz) if math.isfinite(self.seconds) else 0

    def frames(self, config: ModelConfig) -> int:
        """Latent frames including the headroom: those that are valid in the reference's padding mask.

        The reference computes up to two more, which valid frames do not attend to and which it cuts off.
        """
        size = config.samples_per_frame
        headroom = HEADROOM_SECONDS * config.sample_rate_hz // size
        return min(math.ceil(self.samples(config) / size) + headroom, config.sample_size // size)

    def clips(
        self,
        base: Base,
        prompts: Sequence[tuple[int, str]],
        encode: Callable[[list[str]], tuple[Tensor, Tensor]] | None = None,
        before_step: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields (number, audio (C, N)) for each (number, prompt); float32 on the CPU, within -1 .. 1.

        Clip i's noise is drawn on the CPU from (seed, i), so it does not depend on the batch or device except for
        rounding.
        encode        replaces ``base.encode_hidden``, for hidden states that are known already
        before_step   called before each evaluation of the network; an exception ends the generation
        Raises ConfigError as ``check`` does.
        """
        self.check(base.config)
        for begin in range(0, len(prompts), BATCH):
            numbers, texts = zip(*prompts[begin : begin + BATCH], strict=True)
            latents_BDT = self.latents(base, numbers, (encode or base.encode_hidden)(list(texts)), before_step)
            for number, latents_DT in zip(numbers, latents_BDT, strict=True):
                yield number, self.decode(base, latents_DT)

    @torch.no_grad()
    def latents(
        self, base: Base, numbers: Sequence[int], hidden: tuple[Tensor, Tensor], before_step: Callable[[], None]
    ) -> Tensor:
        """Latents (B, D, T) of these clips. hidden: of their prompts, from ``base.encode_hidden``."""
        frames, channels = self.frames(base.config), base.latent_channels

        def noise(step: int) -> Tensor:
            draws = [generator_for(self.seed, "generate", number, step) for number in numbers]
            return torch.stack([draw_noise(frames, channels, draw) for draw in draws]).to(base.device)

        prompts = base.embed_prompts(*hidden), hidden[1].to(base.device)
        return sample(base, noise, prompts, self.seconds, self.steps, Guidance(self.cfg_scale), before_step=before_step)

    def decode(self, base: Base, latents_DT: Tensor) -> Tensor:
        """Audio (C, N) of one clip."""
        return base.decode_latents(latents_DT[None])[0, :, : self.samples(base.config)].clamp(-1, 1).cpu()
