"""Engines of the parallel modes: DDP and DeepSpeed ZeRO."""
