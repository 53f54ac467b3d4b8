"""The loss of one micro batch: predicted velocity against the flow's target, on the frames that count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sa3dist.flow.noising import masked_losses

if TYPE_CHECKING:
    from sa3dist.data.batches.micro_batch import MicroBatch
    from sa3dist.model.base import Base
    from sa3dist.settings import Settings

# The trained loss, then its parts. Each is a column of metrics.jsonl.
LOSSES = ("loss", "loss_gen", "loss_ctx")
# Loss by timestep: sums of the clips' losses, and numbers of clips, with t in [0, 0.2), [0.2, 0.4), ...
TIME_BINS = 5
BY_TIME = tuple(f"{what}_{number}" for what in ("time_losses", "time_clips") for number in range(TIME_BINS))


def micro_batch_loss(base: Base, batch: MicroBatch, settings: Settings) -> dict[str, torch.Tensor]:
    """The ``LOSSES`` and ``BY_TIME`` of one micro batch by name, each of shape (), on the device of the micro batch.

    settings   provides ``mixed_precision`` and ``context_weight``
    """
    device = batch.noised_BDT.device.type
    # Without given context the local conditioning is equal at every frame: None lets the network evaluate it once.
    context = (batch.inpaint_mask_B1T, batch.latents_BDT) if batch.has_context else (None, None)
    with torch.autocast(device, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
        velocity_BDT = base.velocity(
            batch.noised_BDT,
            batch.t_B,
            base.embed_prompts(batch.hidden_BLH, batch.prompt_mask_BL),
            batch.prompt_mask_BL,
            batch.seconds_total_B,
            padding_mask_BT=batch.keep_BT,
            inpaint_mask_B1T=context[0],
            inpaint_latents_BDT=context[1],
            drop_cross_B=batch.drop_cross_B,
            prompt_length=batch.prompt_length,
            packing=batch.packing,
        )
    mask_B1T = batch.inpaint_mask_B1T
    keep_BT = torch.ones_like(mask_B1T[:, 0], dtype=torch.bool) if batch.keep_BT is None else batch.keep_BT
    gen_B, ctx_B = masked_losses(velocity_BDT, batch.target_BDT, keep_BT, mask_B1T)
    loss_gen, loss_ctx = gen_B.mean(), ctx_B.mean()
    parts = loss_gen + settings.context_weight * loss_ctx, loss_gen, loss_ctx
    losses_B = (gen_B + settings.context_weight * ctx_B).detach()
    return dict(zip((*LOSSES, *BY_TIME), (*parts, *_by_time(losses_B, batch.t_B)), strict=True))


def _by_time(losses_B: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """``BY_TIME``; t = 1 belongs to the last bin. Stays on the device, so that no step waits for it."""
    bins_B = (t_B * TIME_BINS).floor().clamp(max=TIME_BINS - 1)
    chosen_NB = (torch.arange(TIME_BINS, device=t_B.device)[:, None] == bins_B).to(losses_B.dtype)
    return torch.cat([(chosen_NB * losses_B).sum(dim=1), chosen_NB.sum(dim=1)])
