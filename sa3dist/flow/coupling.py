"""Noise coupling: pair the clips of a micro batch with noises by an entropic optimal transport plan."""

import torch

SINKHORN_ROUNDS = 20


def couple_noise(latents_BDT: torch.Tensor, noise_BDT: torch.Tensor) -> torch.Tensor:
    """Permutation that pairs clips with noise: clip i uses ``noise_BDT[permutation[i]]``.

    Both tensors have shape (B, D, T); every value counts, padding included. Returns int64 of shape (B,).
    Greedy in clip order over a Sinkhorn plan, as the reference pairs them. Source: spec/training.md 2.5.
    """
    batch = latents_BDT.shape[0]
    if batch == 1:
        return torch.zeros(1, dtype=torch.long, device=latents_BDT.device)
    # float64: costs of order 1e6 differ by tens, so float32 sums would let a summation order decide the pairing.
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
