"""Seeded training samples: slot → clip → crop → noised micro batch, a pure function of the seed.

A slot is the position of a sample in the endless sequence of a run. Every draw is keyed by (seed, purpose, slot), so
it does not matter which rank or worker makes a sample.

Suffixes: B clips, D latent channels, T latent frames, L prompt tokens, H prompt features.
"""

import dataclasses
import math

import torch

from sa3dist import flow
from sa3dist.data.latents.cache import ClipLatents, EncodedClips
from sa3dist.flow.crops import draw_crop
from sa3dist.formats import ClipEntry
from sa3dist.model.config import ShiftConfig
from sa3dist.model.packing import FilledPacking, Packing, TensorFields

# Prompt lengths are rounded up to a multiple of this many tokens.
PROMPT_STEP = 32


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """What samples depend on besides the clips.

    shift            the base's timestep shift, if it has one
    bucket_batches   number of micro batches whose clips are sorted by length together; 1 = plain shuffle
    """

    seed: int
    micro_batch: int
    crop_frames: int
    prompt_dropout: float
    seconds_total_of: str
    shift: ShiftConfig | None
    bucket_batches: int = 1


@dataclasses.dataclass
class MicroBatch(TensorFields):
    """One micro batch, ready for the step.

    keep_BT          True for real frames; None if all are
    hidden_BLH       may end in one position that is padding in every clip and represents the rest of ``prompt_length``
    packing          packed form of keep_BT: the frames the network computes; None if keep_BT is
    has_context      whether any frame is given as context; a host value, so that asking does not synchronise the device
    repeated_clips   clips that a stream has already given before; 0 for indexed data sets
    """

    clips: list[str]
    latents_BDT: torch.Tensor
    noised_BDT: torch.Tensor
    target_BDT: torch.Tensor
    t_B: torch.Tensor
    keep_BT: torch.Tensor | None
    inpaint_mask_B1T: torch.Tensor
    hidden_BLH: torch.Tensor
    prompt_mask_BL: torch.Tensor
    seconds_total_B: torch.Tensor
    drop_cross_B: torch.Tensor
    has_context: bool
    silent_crops: int
    repeated_clips: int = 0
    prompt_length: int | None = None
    packing: Packing | FilledPacking | None = None

    def tensors(self) -> list[torch.Tensor]:
        packed = [] if self.packing is None else vars(self.packing).values()
        return [value for value in (*vars(self).values(), *packed) if isinstance(value, torch.Tensor)]


@dataclasses.dataclass
class Sample:
    """One slot's part of a micro batch. Noise is coupled with all of latents_DT; ``frames`` of it are trained on."""

    slot: int
    clip: str
    latents_DT: torch.Tensor
    frames: int
    seconds_total: float
    hidden_LH: torch.Tensor
    prompt_mask_L: torch.Tensor
    dropped: bool
    silent: bool
    effective_frames: int


def without_common_padding(hidden_BLH: torch.Tensor, mask_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt features and mask, cut to the longest prompt plus at least one position of padding.

    All padding is alike, so one position represents it. The length is a multiple of PROMPT_STEP, to limit the number
    of shapes.
    """
    used = int(mask_BL.sum(1).max())
    length = min((used // PROMPT_STEP + 1) * PROMPT_STEP, mask_BL.shape[1])
    return hidden_BLH[:, :length].contiguous(), mask_BL[:, :length].contiguous()


def draw_sample(
    slot: int,
    clip: ClipEntry,
    latents: ClipLatents,
    prompt: tuple[torch.Tensor, torch.Tensor],
    settings: SampleSettings,
    framing: EncodedClips,
) -> Sample:
    """Draw the crop, the silence extension and the prompt dropout of one slot.

    latents   in the slot's polarity
    prompt    features and mask of the caption
    """
    seed, limit = settings.seed, settings.crop_frames
    start, silent = draw_crop(latents.peaks_T, limit, seed, slot)
    valid = min(latents.valid_frames - start, limit)
    mean_frames = flow.draws.EXTENSION_SECONDS * framing.sample_rate_hz / framing.samples_per_frame
    frames = min(limit, valid + flow.draw_extension(mean_frames, flow.generator_for(seed, "extension", slot)))
    file_seconds = math.ceil(clip.seconds)
    crop_seconds = math.ceil(min(clip.seconds, limit * framing.samples_per_frame / framing.sample_rate_hz))
    seconds_total = file_seconds if settings.seconds_total_of == "file" else crop_seconds
    dropped = torch.rand(1, generator=flow.generator_for(seed, "prompt_dropout", slot)) < settings.prompt_dropout
    return Sample(
        slot=slot,
        clip=clip.key,
        # Coupling compares whole crops, including the silence after short clips.
        latents_DT=latents.window(start, limit if settings.micro_batch > 1 else frames),
        frames=frames,
        seconds_total=float(seconds_total),
        hidden_LH=prompt[0],
        prompt_mask_L=prompt[1],
        dropped=bool(dropped),
        silent=silent,
        effective_frames=flow.effective_frames(seconds_total, framing.sample_rate_hz, framing.samples_per_frame),
    )


def collate(samples: list[Sample], settings: SampleSettings) -> MicroBatch:
    """Make a micro batch: draw t, noise and mask per slot, couple the noise, pad, mix, and form the target."""
    seed = settings.seed
    lengths = [sample.frames for sample in samples]
    longest = max(lengths)
    latents_BDT = torch.stack([sample.latents_DT for sample in samples])
    channels, drawn_frames = latents_BDT.shape[1:]
    noise_BDT = torch.stack(
        [flow.draw_noise(drawn_frames, channels, flow.generator_for(seed, "noise", sample.slot)) for sample in samples]
    )
    # Couple over whole crops, as the reference does, before cutting to the longest sample.
    noise_BDT = noise_BDT[flow.couple_noise(latents_BDT, noise_BDT)]
    latents_BDT, noise_BDT = latents_BDT[..., :longest].contiguous(), noise_BDT[..., :longest].contiguous()
    inpaint_mask_B1T = torch.zeros(len(samples), 1, longest)
    t_B = torch.empty(len(samples))
    for row, (sample, frames) in enumerate(zip(samples, lengths, strict=True)):
        mask = flow.draw_inpaint_mask(frames, frames, flow.generator_for(seed, "inpaint", sample.slot))
        inpaint_mask_B1T[row, 0, :frames] = mask
        t_B[row] = flow.sample_timesteps(1, flow.generator_for(seed, "timestep", sample.slot))
    effective_B = torch.tensor([sample.effective_frames for sample in samples])
    if settings.shift is not None:
        shift = settings.shift
        lengths_and_shifts = shift.min_length, shift.max_length, shift.base_shift, shift.max_shift
        t_B = flow.shift_timesteps(t_B, effective_B, *lengths_and_shifts)
    noised_BDT, target_BDT = flow.noise_latents(latents_BDT, noise_BDT, t_B)
    hidden_BLH, prompt_mask_BL = without_common_padding(
        torch.stack([sample.hidden_LH for sample in samples]), torch.stack([sample.prompt_mask_L for sample in samples])
    )
    keep_BT = torch.arange(longest)[None] < torch.tensor(lengths)[:, None] if min(lengths) < longest else None
    return MicroBatch(
        clips=[sample.clip for sample in samples],
        latents_BDT=latents_BDT,
        noised_BDT=noised_BDT,
        target_BDT=target_BDT,
        t_B=t_B,
        keep_BT=keep_BT,
        packing=None if keep_BT is None else Packing.of(keep_BT),
        inpaint_mask_B1T=inpaint_mask_B1T,
        hidden_BLH=hidden_BLH,
        prompt_mask_BL=prompt_mask_BL,
        seconds_total_B=torch.tensor([sample.seconds_total for sample in samples]),
        drop_cross_B=torch.tensor([sample.dropped for sample in samples]),
        has_context=bool(inpaint_mask_B1T.any()),
        silent_crops=sum(sample.silent for sample in samples),
        prompt_length=len(samples[0].prompt_mask_L),
    )
