"""Latents and prompt features on disk: the cache, latent shards, crops."""
