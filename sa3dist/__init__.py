"""Distributed LoRA trainer for Stable Audio 3: a zip of captioned clips goes in, one adapter file comes out."""

__version__ = "0.1.0"
