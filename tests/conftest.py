"""Shared fixtures: where the golden tensors are, and the two tiny reference models."""

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
TINY_MODELS = ("tiny-sa3", "tiny-sa3-small")


def golden(name: str) -> Path:
    """Path of one recorded artefact."""
    return GOLDEN / name


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=TINY_MODELS)
def tiny_name(request) -> str:
    return request.param
