"""Processes acting as one: rank and world size, waiting, checkpoints, signals."""
