"""Noise of a micro batch: drawing it, pairing it with clips, mixing both; and the loss of the predicted velocity."""

import math

import torch

from sa3dist.flow.draws import require_shape

# torch draws normals in blocks of 16 and redraws an incomplete last block. Drawing whole blocks makes a short draw a
# prefix of a longer one from the same generator.
_NORMAL_BLOCK = 16


def draw_noise(frames: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise of one clip, float32 of shape (channels, frames).

    Drawn frame by frame: a shorter draw is a prefix of a longer one from an equal generator, so neither padding nor a
    neighbour's length changes a clip's noise.
    """
    count = frames * channels
    whole_blocks = math.ceil(count / _NORMAL_BLOCK) * _NORMAL_BLOCK
    return torch.randn(whole_blocks, generator=generator)[:count].view(frames, channels).T.contiguous()


def noise_latents(
    latents_BDT: torch.Tensor, noise_BDT: torch.Tensor, t_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix clips and noise at time t, and compute the target velocity.

    latents_BDT, noise_BDT   float32 of shape (B, D, T)
    t_B                      time of each clip: 0 = data, 1 = noise
    Returns (noised, target), both (B, D, T): (1 - t) latents + t noise, and noise - latents.
    Raises ValueError for other shapes. Source: spec/training.md 2.6.
    """
    require_shape("noise_BDT", noise_BDT, latents_BDT.shape)
    require_shape("t_B", t_B, latents_BDT.shape[:1])
    t_B11 = t_B[:, None, None]
    return (1 - t_B11) * latents_BDT + t_B11 * noise_BDT, noise_BDT - latents_BDT


def _mean_of_clips(error_BDT: torch.Tensor, frames_BT: torch.Tensor) -> torch.Tensor:
    weight = frames_BT.to(error_BDT.dtype)
    per_clip = (error_BDT.sum(dim=1) * weight).sum(dim=1)
    return per_clip / (weight.sum(dim=1) * error_BDT.shape[1] + 1e-8)


def masked_loss(
    velocity_BDT: torch.Tensor,
    target_BDT: torch.Tensor,
    keep_BT: torch.Tensor,
    inpaint_mask_B1T: torch.Tensor,
    context_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared velocity error: mean per clip, then over clips, for context and generated frames separately.

    velocity_BDT, target_BDT   shape (B, D, T); computed in float32 or wider
    keep_BT                    true or 1 where a frame counts (clip and silence extension)
    inpaint_mask_B1T           1 = given context, 0 = to generate
    Returns (loss, loss_gen, loss_ctx), scalars, loss = loss_gen + context_weight * loss_ctx. A clip without frames in a
    part contributes 0 to that part. Raises ValueError for other shapes. Source: spec/training.md 2.11.
    """
    gen_B, ctx_B = masked_losses(velocity_BDT, target_BDT, keep_BT, inpaint_mask_B1T)
    loss_gen, loss_ctx = gen_B.mean(), ctx_B.mean()
    return loss_gen + context_weight * loss_ctx, loss_gen, loss_ctx


def masked_losses(
    velocity_BDT: torch.Tensor, target_BDT: torch.Tensor, keep_BT: torch.Tensor, inpaint_mask_B1T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses per clip that ``masked_loss`` averages: (generated, context), both of shape (B,)."""
    batch, _, frames = velocity_BDT.shape
    require_shape("target_BDT", target_BDT, velocity_BDT.shape)
    require_shape("keep_BT", keep_BT, (batch, frames))
    require_shape("inpaint_mask_B1T", inpaint_mask_B1T, (batch, 1, frames))
    wide = torch.promote_types(velocity_BDT.dtype, torch.float32)
    keep = keep_BT.bool()
    context = inpaint_mask_B1T[:, 0].bool()
    # where, not a product: other frames may hold anything, and 0 * NaN is NaN.
    error = torch.where(keep[:, None, :], velocity_BDT.to(wide) - target_BDT.to(wide), 0.0).square()
    return _mean_of_clips(error, keep & ~context), _mean_of_clips(error, keep & context)


SINKHORN_ROUNDS = 20


def couple_noise(latents_BDT: torch.Tensor, noise_BDT: torch.Tensor) -> torch.Tensor:
    """Permutation that pairs clips with noise: clip i uses ``noise_BDT[permutation[i]]``.

    Both tensors have shape (B, D, T); every value counts, padding included. Returns int64 of shape (B,).
    Greedy in clip order over a Sinkhorn plan, as the reference pairs them. Raises ValueError for different shapes.
    Source: spec/training.md 2.5.
    """
    require_shape("noise_BDT", noise_BDT, latents_BDT.shape)
    batch = latents_BDT.shape[0]
    if batch == 1:
        return torch.zeros(1, dtype=torch.long, device=latents_BDT.device)
    # float64: costs of order 1e6 differ by tens, so in float32 the order of summation would decide the pairing.
    latents = latents_BDT.flatten(1).double()
    noise = noise_BDT.flatten(1).double()
    cost = latents.square().sum(1)[:, None] + noise.square().sum(1)[None, :] - 2 * latents @ noise.T
    plan = -cost / cost.mean()
    for _ in range(SINKHORN_ROUNDS):
        plan = plan - plan.logsumexp(dim=1, keepdim=True)
        plan = plan - plan.logsumexp(dim=0, keepdim=True)
    permutation = torch.empty(batch, dtype=torch.long, device=plan.device)
    for clip in range(batch):
        chosen = plan[clip].argmax()
        permutation[clip] = chosen
        plan[:, chosen] = -torch.inf
    return permutation
