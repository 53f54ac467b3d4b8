"""Writes a released shape as a model directory with random weights, including a text encoder, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from encoding_side import TEXT_ENCODER

from sa3dist.formats import write_json
from sa3dist.model.loading import CONFIG_NAME, WEIGHTS_NAME
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.random_weights import RandomWeights
from sa3dist.model.released import released_config
from sa3dist.model.tiny import TEXT_FOLDER, byte_tokenizer

# T5Gemma's own vocabulary (spec of t5gemma-b-b-ul2): its table is most of the encoder's file.
VOCABULARY = 256_000
ITEM_BYTES = {"F32": 4, "BF16": 2}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def write_released_shape(directory: Path, shape: str, device: torch.device, depth: int | None = None) -> int:
    """Write model_config.json, a float32 model.safetensors and the text encoder; returns the bytes of the weights.

    device   where values are drawn: a GPU is much faster for a large base
    """
    value = released_config(shape, depth)
    config = parse_model_config(value, shape)
    weights = RandomWeights(config, 1, device)
    write_json(directory / CONFIG_NAME, value)
    written = write_streamed(
        directory / WEIGHTS_NAME,
        weights.shapes,
        "F32",
        lambda name, size: weights.read(name, size, "cpu", torch.float32),
    )
    write_text_encoder(directory / TEXT_FOLDER, device)
    return written


def write_streamed(path: Path, shapes: dict[str, tuple[int, ...]], kind: str, draw) -> int:
    """Write a safetensors file with one tensor in memory at a time; returns the bytes of its tensors.

    shapes   of all tensors, by name
    kind     F32 or BF16
    draw     returns a CPU tensor of that dtype for (name, shape)
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + ITEM_BYTES[kind] * torch.Size(shape).numel()
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = draw(name, shape)
            assert values.dtype == DTYPES[kind]
            file.write(values.contiguous().flatten().view(torch.uint8).numpy())
    return offset


def write_text_encoder(directory: Path, device: torch.device) -> None:
    """T5Gemma b-b-ul2's encoder in its real size and dtype (bfloat16), with a byte tokenizer."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    half = T5GemmaModuleConfig(**{**TEXT_ENCODER, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None})
    config = T5GemmaConfig(
        encoder=half,
        decoder=half,
        is_encoder_decoder=False,
        vocab_size=VOCABULARY,
        architectures=["T5GemmaEncoderModel"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in T5GemmaEncoderModel(config).named_parameters()}
    generator = torch.Generator(device).manual_seed(5)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        # Norm weights are offsets from 1; matrices keep the scale of their input.
        spread = 0.1 if len(shape) == 1 else shape[1] ** -0.5
        values = torch.randn(shape, generator=generator, device=device) * spread
        return values.to("cpu", torch.bfloat16)

    write_streamed(directory / "model.safetensors", shapes, "BF16", draw)
    value = config.to_dict()
    value.pop("transformers_version", None)
    write_json(directory / "config.json", value)
    byte_tokenizer().save_pretrained(directory)
