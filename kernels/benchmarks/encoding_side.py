"""What the reference computes before every step: it encodes the clip's audio and caption, which never change."""

from __future__ import annotations

import torch

from sa3dist.model.base import Base

# T5Gemma b-b-ul2's encoder (spec/model.md 6.1), with a smaller vocabulary: a look-up costs the same.
TEXT_ENCODER = {
    "vocab_size": 1000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "layer_types": ["full_attention"] * 12,
    "max_position_embeddings": 512,
}


class Encoding:
    """The released autoencoder's encoder and T5Gemma's encoder, with random weights and inputs."""

    def __init__(self, base: Base, frames: int, clips: int) -> None:
        """base: its autoencoder, dtype and device are used."""
        generator = torch.Generator().manual_seed(4)
        self._base = base
        samples = frames * base.samples_per_frame
        self._audio_BCN = torch.randn(clips, base.config.audio_channels, samples, generator=generator).to(base.device)
        tokens = torch.randint(0, TEXT_ENCODER["vocab_size"], (clips, base.prompt_tokens), generator=generator)
        self._tokens_BL = tokens.to(base.device)
        self._mask_BL = (torch.arange(base.prompt_tokens) < 20).expand(clips, -1).to(base.device)
        self._text = text_encoder(base)

    @torch.no_grad()
    def step(self) -> None:
        """Encode and discard the result: all sides train on the same given latents."""
        self._base.encode_audio(self._audio_BCN)
        self._text(input_ids=self._tokens_BL, attention_mask=self._mask_BL)


def text_encoder(base: Base) -> torch.nn.Module:
    """T5Gemma's encoder with random weights, in bfloat16 as it is stored; on a CPU in the base's dtype."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    half = T5GemmaModuleConfig(**TEXT_ENCODER)
    config = T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False, vocab_size=half.vocab_size)
    dtype = torch.bfloat16 if base.device.type == "cuda" else base.dtype
    return T5GemmaEncoderModel(config).to(base.device, dtype).eval()
