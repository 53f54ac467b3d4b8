"""Latents and prompt features on disk: cache, latent shards, crops."""
