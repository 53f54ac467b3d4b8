"""The diffusers port as an independent oracle, on the subset it can represent, with random non-zero weights.

It has no padding mask, no chunked SAME and another block-norm epsilon; key mapping: its own names on the right.
"""

import pytest
import torch

from sa3dist.model.base import Base
from sa3dist.model.frequencies import expo_frequencies
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.random_weights import RandomWeights
from sa3dist.model.tiny import tiny_config
from tests.helpers.diffusers_port import DIFFERENTIAL, port_of_dit, renamed, reorder


def random_tiny(shape):
    config = parse_model_config(tiny_config(shape, depth=3), f"tiny {shape}")
    return Base(config, RandomWeights(config, seed=5), "cpu", torch.float32, text_source=None, encoder=True)


@pytest.mark.parametrize("shape", ["medium", "small"])
@torch.no_grad()
def test_dit_equals_the_port(shape):
    base = random_tiny(shape)
    port = port_of_dit(base)
    x, t = torch.randn(2, 64, 37), torch.tensor([0.03, 0.97])
    cross, embed = torch.randn(2, 129, 768), torch.randn(2, 768)
    for local in (torch.randn(2, 65, 37), torch.zeros(2, 65, 37), None):
        expected = port(x, t, cross, embed, local_add_cond=local).sample
        torch.testing.assert_close(base.dit(x, t, cross, embed, local), expected, atol=2e-5, rtol=1e-4)
    # One zero frame stands for all of them.
    ours = base.dit(x, t, cross, embed, torch.zeros(1, 65, 1))
    torch.testing.assert_close(ours, base.dit(x, t, cross, embed, torch.zeros(2, 65, 37)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("samples", [4096 * 3, 4096 * 2 + 17, 4096 * 150])
@torch.no_grad()
def test_sliding_window_same_equals_the_port(samples):
    base = random_tiny("medium")
    config = base.config.autoencoder
    port = pytest.importorskip("diffusers").AutoencoderSAME(
        patch_size=config.patching.patch_size,
        encoder_channels=config.encoder.channels,
        encoder_c_mults=tuple(config.encoder.c_mults),
        encoder_strides=tuple(config.encoder.strides),
        encoder_transformer_depths=tuple(config.encoder.transformer_depths),
        latent_dim=config.latent_dim,
        dim_heads=config.encoder.dim_heads,
        decoder_sinusoidal_blocks=tuple(config.decoder.sinusoidal_blocks),
    )
    base.decode_latents(torch.zeros(1, config.latent_dim, 1))
    table = [
        ("encoder.layers.0.", "encoder.blocks.0."),
        ("encoder.layers.2.", "encoder.proj."),
        ("decoder.layers.1.", "decoder.proj."),
        ("decoder.layers.3.", "decoder.blocks.0."),
        (".pre_norm.", ".norm_attn."),
        (".ff_norm.", ".norm_ff."),
        (".self_attn.", ".attn."),
        (".ff.ff.0.proj.", ".ff.proj_in."),
        (".ff.ff.2.", ".ff.proj_out."),
        ("bottleneck.scaling_factor", "bottleneck.scale"),
    ]
    state = renamed(base.autoencoder.state_dict(), table)
    state = {key: value for key, value in state.items() if not key.endswith(("noise_scaling_factor", "inv_freq"))}
    for key in [key for key in state if key.endswith("to_qkv.weight")]:
        state[key] = reorder(state[key], DIFFERENTIAL)
    port.load_state_dict(state)
    port.eval()
    audio = 0.1 * torch.randn(1, 2, samples)
    latents = base.encode_audio(audio)
    expected = port.encode(audio).latents
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    decoded = port.decode(latents).sample
    torch.testing.assert_close(
        base.decode_latents(latents), decoded[:, :, : latents.shape[2] * 4096], atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_number_conditioner_equals_the_ports_duration_embedder():
    pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    base = random_tiny("small")
    linear = base.conditioner.seconds_total.embedder.embedding[1]
    port = StableAudio3DurationEmbedder()
    port.load_state_dict({"linear.weight": linear.weight, "linear.bias": linear.bias}, strict=False)
    # It finds them anew, as this processor does.
    port.freqs.copy_(expo_frequencies(port.freqs.device))
    seconds = torch.tensor([0.0, 0.37, 12.5, 190.0, 384.0, 1000.0])
    ours = base.conditioner.seconds_total(seconds, torch.float32)[:, 0]
    torch.testing.assert_close(ours, port(seconds).reshape(6, -1), atol=1e-5, rtol=0)
