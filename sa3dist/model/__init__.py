"""Stable Audio 3: diffusion transformer, SAME autoencoder, conditioners, and loading of the released files."""
