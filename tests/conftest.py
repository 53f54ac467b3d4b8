"""Shared fixtures: where the golden tensors are, and the two tiny reference models."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sa3dist.model.loading import load_base

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


@pytest.fixture(scope="session")
def _tiny_tensors() -> dict:
    return {name: load_file(golden(f"{name}/golden.safetensors")) for name in TINY_MODELS}


@pytest.fixture
def recorded(tiny_name, _tiny_tensors) -> dict[str, torch.Tensor]:
    """The tensors the reference implementation gave for this tiny model."""
    return _tiny_tensors[tiny_name]


@pytest.fixture
def tiny_base(tiny_name):
    """A fresh base: a test may cast or damage it."""
    return load_base(golden(tiny_name))
