"""The recorded training step of a tiny model: its micro batch, and settings that need no pydantic."""

import dataclasses
import functools
import json

import torch
from safetensors.torch import load_file

from sa3dist import flow
from sa3dist.data.batches.micro_batch import MicroBatch
from sa3dist.model.loading import load_base
from sa3dist.model.packing import Packing
from tests.helpers.golden import golden

SECONDS = (1.0, 30.0)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What training reads of the settings tree; the GPU check runs where that cannot be imported."""

    mixed_precision: str = "no"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    context_weight: float = 1.0
    gradient_compression: str = "none"
    adapter_products: str = "auto"
    gradient_checkpointing: str = "auto"


def recorded_run(kind):
    """Everything the reference recorded of one run: (adapter type, tensors, description)."""
    described = json.loads(golden("training/golden.json").read_text())["tiny_sa3"]
    recorded = load_file(golden("training") / described["runs"][kind]["step_file"])
    return kind, recorded, {**described, **described["runs"][kind]}


def make_batch(base, recorded) -> MicroBatch:
    model = load_file(golden("tiny-sa3/golden.safetensors"))
    permutation = flow.couple_noise(recorded["latents"], recorded["noise"])
    frames = [flow.effective_frames(s, base.sample_rate_hz, base.samples_per_frame) for s in SECONDS]
    t_B = flow.shift_timesteps(1 - recorded["t_sampler"], torch.tensor(frames))
    noised, target = flow.noise_latents(recorded["latents"], recorded["noise"][permutation], t_B)
    return MicroBatch(
        clips=["a", "b"],
        latents_BDT=recorded["latents"],
        noised_BDT=noised,
        target_BDT=target,
        t_B=t_B,
        keep_BT=None,
        inpaint_mask_B1T=recorded["inpaint_mask"],
        hidden_BLH=model["prompt.hidden_states"][[0, 2]],
        prompt_mask_BL=model["prompt.mask"][[0, 2]],
        seconds_total_B=torch.tensor(SECONDS),
        drop_cross_B=torch.zeros(2, dtype=torch.bool),
        has_context=bool(recorded["inpaint_mask"].any()),
        silent_crops=0,
    )


def recorded_batch(base):
    return make_batch(base, load_file(golden("training/tiny_sa3_step_dora_rows.safetensors")))


def shifted(batch, number):
    """Other values in the same shapes."""
    noise = torch.randn(batch.noised_BDT.shape, generator=torch.Generator().manual_seed(number))
    noise = noise.to(batch.noised_BDT.device)
    return dataclasses.replace(batch, noised_BDT=batch.noised_BDT + noise, target_BDT=batch.target_BDT - noise)


def shorten_second_clip(batch):
    """Make the second clip shorter, as the loader hands it over: its mask and packing come from the host."""
    frames = batch.noised_BDT.shape[2]
    batch.keep_BT = torch.arange(frames)[None] < torch.tensor([[frames], [frames - 5]])
    batch.packing = Packing.of(batch.keep_BT).to(batch.noised_BDT.device)
    batch.keep_BT = batch.keep_BT.to(batch.noised_BDT.device)
    return batch


@functools.cache
def both_shapes():
    """The recorded micro batch, and the same with its second clip five frames shorter."""
    whole = recorded_batch(load_base(golden("tiny-sa3")))
    frames = whole.noised_BDT.shape[2]
    keep_BT = torch.arange(frames)[None] < torch.tensor([[frames], [frames - 5]])
    return whole, dataclasses.replace(whole, keep_BT=keep_BT, packing=Packing.of(keep_BT))
