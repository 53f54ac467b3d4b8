"""Fused operations for adapted layers: torch reference, autograd, dispatch."""
