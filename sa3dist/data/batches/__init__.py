"""Micro batches from latents: order, draws, loader processes, streaming."""
