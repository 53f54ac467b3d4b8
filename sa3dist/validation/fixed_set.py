"""The fixed validation set: the same crops of held-out clips, with the same noise, at the same times.

Suffixes: B clips, D latent channels, T latent frames.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from sa3dist.data.batches.batch_source import BatchSource
from sa3dist.data.batches.micro_batch import MicroBatch, collate, draw_sample
from sa3dist.data.latents.encode_tasks import CAPTION_COST, EncodeTask
from sa3dist.flow.crops import polarity_of_slot
from sa3dist.formats import ClipEntry, digest_of
from sa3dist.model.base import Base

# As in the reference trainer.
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
# Few clips give several crops each, so that a single one has little influence; of many clips only some are used.
FEWEST_CROPS, MOST_CROPS = 8, 32
# Above all seeds that settings allow, so that no draw equals one of training.
SEED_OFFSET = 1 << 31


@dataclasses.dataclass(frozen=True)
class Crop:
    """One crop of the set. Its draws depend on ``slot`` and the set's seed."""

    slot: int
    clip: ClipEntry


class FixedSet:
    """The crops of a data set's ``held_out`` clips; the same in every process."""

    def __init__(self, source: BatchSource) -> None:
        self._encoded = source.held_encoded
        seed = source.draws.seed + SEED_OFFSET
        self._draws = dataclasses.replace(source.draws, seed=seed, micro_batch=1, prompt_dropout=0.0)
        # A pseudo-random order, so that a subset has clips of every folder.
        clips = sorted(source.held_out, key=lambda clip: digest_of(str(seed), clip.key))
        count = min(max(len(clips), FEWEST_CROPS), MOST_CROPS)
        self.crops = [Crop(slot, clips[slot % len(clips)]) for slot in range(count)]

    @property
    def digest(self) -> str:
        """Identifies the set: its clips, draws and times."""
        clips = [part for crop in self.crops for part in (crop.clip.audio_sha256, crop.clip.caption)]
        return digest_of(*clips, repr(self._draws), repr(TIMES))[:16]

    def of_ranks(self, world_size: int) -> list[Crop]:
        """The crops, padded with repeats to a multiple of world_size; rank r takes every world_size-th one from r."""
        missing = -len(self.crops) % world_size
        return self.crops + [self.crops[number % len(self.crops)] for number in range(missing)]

    def encode_tasks(self, world_size: int) -> list[EncodeTask]:
        """The work of encoding the set, in the order of ``of_ranks``."""
        return [self._task(crop) for crop in self.of_ranks(world_size)]

    def _task(self, crop: Crop) -> EncodeTask:
        encoded, seed = self._encoded, self._draws.seed

        def encode(base: Base, loaded_CN: torch.Tensor | None) -> Path | None:
            encoded.encode_prompts(base, [crop.clip.caption])
            return encoded.encode_slot(base, crop.clip, seed, crop.slot, loaded_CN)

        return EncodeTask(
            cost=1.0 + CAPTION_COST,
            count=1,
            memory=encoded.slot_bytes(crop.clip),
            is_missing=lambda: True,
            load=lambda: encoded.load_slot(crop.clip, seed, crop.slot),
            encode=encode,
        )

    def batches(self, crop: Crop) -> Iterator[MicroBatch]:
        """One micro batch of this crop per time in ``TIMES``: with its prompt, and no frames given as context."""
        encoded, seed = self._encoded, self._draws.seed
        latents = encoded.latents(crop.clip, polarity_of_slot(seed, crop.slot))
        prompt = encoded.prompt(crop.clip.caption)
        sample = draw_sample(crop.slot, crop.clip, latents, prompt, self._draws, encoded)
        drawn = collate([sample], self._draws)
        mask_B1T = torch.zeros_like(drawn.inpaint_mask_B1T)
        for t in TIMES:
            # latents + t (noise - latents)
            noised_BDT = drawn.latents_BDT + t * drawn.target_BDT
            changes = {"t_B": torch.tensor([t]), "noised_BDT": noised_BDT, "inpaint_mask_B1T": mask_B1T}
            yield dataclasses.replace(drawn, has_context=False, **changes)
