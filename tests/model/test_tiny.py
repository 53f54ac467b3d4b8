"""The tiny base: the official format, the real framing and text path, the same bytes for the same arguments."""

import pytest
import torch

import sa3dist
from sa3dist.errors import ConfigError
from sa3dist.model.tiny import write_tiny_base


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shape", ["medium", "small"])
def test_tiny_base_has_the_same_bytes_for_the_same_arguments(tmp_path, shape):
    first = contents(write_tiny_base(tmp_path / "first", shape))
    assert first == contents(write_tiny_base(tmp_path / "second", shape))
    other = contents(write_tiny_base(tmp_path / "other", shape, seed=1))
    assert first["model.safetensors"] != other["model.safetensors"]
    assert sum(map(len, first.values())) < 25e6
    assert {"model_config.json", "model.safetensors", "t5gemma-b-b-ul2/config.json"} <= set(first)


@pytest.mark.parametrize("shape", ["medium", "small"])
def test_tiny_base_runs_audio_text_and_velocity_with_the_real_framing(tmp_path, shape, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = sa3dist.load_base(write_tiny_base(tmp_path, shape))
    assert (base.sample_rate_hz, base.samples_per_frame) == (44100, 4096)
    audio = 0.1 * torch.randn(1, 2, 3 * 4096 + 1)
    latents = base.encode_audio(audio)
    assert latents.shape == (1, base.latent_channels, 4)
    assert 0.1 < latents.std() < 10
    # The latents follow the audio: they are not the constant the new tokens alone would give.
    assert latents.std(dim=2).mean() > 0.05
    assert base.decode_latents(latents).shape == (1, 2, 4 * 4096)
    embeds, mask = base.encode_prompts(["a bass drum", "", "ä" * 500])
    assert embeds.shape == (3, 128, 768)
    assert mask.sum(dim=1).tolist() == [11, 0, 128]
    assert torch.isfinite(embeds).all()
    velocity = base.velocity(torch.randn_like(latents), torch.tensor([0.5]), embeds[:1], mask[:1], torch.tensor([1.0]))
    assert 0.1 < velocity.std() < 10


def test_every_weight_of_a_tiny_base_is_off_zero(tmp_path):
    base = sa3dist.load_base(write_tiny_base(tmp_path))
    dead = [name for name, value in base.state_dict().items() if value.numel() and value.abs().max() == 0]
    assert dead == []


def test_unknown_shape_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="large"):
        write_tiny_base(tmp_path / "never", "large")
    assert not (tmp_path / "never").exists()
