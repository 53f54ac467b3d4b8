"""Writes a tiny base with random weights in the official format, with a text encoder; it trains in seconds."""

from pathlib import Path

import torch

from sa3dist.errors import ConfigError
from sa3dist.formats import write_json
from sa3dist.model.conditioners import HIDDEN_WIDTH
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.random_weights import RandomWeights, uniform
from sa3dist.model.released import released_config
from sa3dist.model.rewrite_safetensors import write_safetensors

TEXT_FOLDER = "t5gemma-b-b-ul2"
LATENT_CHANNELS = 64
WIDTH = 128
PROMPT_TOKENS = 128
_RELEASED_TWIN = {"medium": "medium-base", "small": "small-music-base"}


def write_tiny_base(directory: str | Path, shape: str = "medium", seed: int = 0, depth: int = 2) -> Path:
    """Write model_config.json, model.safetensors and a text encoder folder; the same arguments give the same bytes.

    shape   medium: differential attention, sliding-window SAME; small: plain attention, chunked SAME
    depth   DiT layers, all 128 wide with heads of 64; 4096 samples per latent frame as in the released models
    Returns the directory. Raises ConfigError for an unknown shape.
    """
    if shape not in _RELEASED_TWIN:
        raise ConfigError(f"shape={shape}: expected one of {', '.join(_RELEASED_TWIN)}")
    return write_random_base(directory, tiny_config(shape, depth), seed)


def write_random_base(directory: str | Path, value: dict, seed: int) -> Path:
    """Write a base of random weights with ``value`` as its model_config.json, and a tiny text encoder."""
    directory = Path(directory)
    weights = RandomWeights(parse_model_config(value, str(directory / "model_config.json")), seed)
    tensors = {key: weights.read(key, size, "cpu", torch.float32) for key, size in weights.shapes.items()}
    write_json(directory / "model_config.json", value)
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_text_encoder(directory / TEXT_FOLDER, seed)
    return directory


def tiny_config(shape: str, depth: int) -> dict:
    """The released config of the same family, narrowed."""
    value = released_config(_RELEASED_TWIN[shape], depth)
    model = value["model"]
    model["io_channels"] = LATENT_CHANNELS
    model["conditioning"]["configs"][0]["config"].update(repo_id=None, max_length=PROMPT_TOKENS)
    model["diffusion"]["config"].update(
        embed_dim=WIDTH,
        num_heads=2,
        io_channels=LATENT_CHANNELS,
        local_add_cond_dim=LATENT_CHANNELS + 1,
        num_memory_tokens=16,
        ff_kwargs={"mult": 2.0},
    )
    autoencoder = model["pretransform"]["config"]
    autoencoder["latent_dim"] = LATENT_CHANNELS
    autoencoder["bottleneck"]["config"]["dim"] = LATENT_CHANNELS
    for side in ("encoder", "decoder"):
        autoencoder[side]["config"].update(
            latent_dim=LATENT_CHANNELS, channels=16, c_mults=[4], dim_heads=32, transformer_depths=[2]
        )
    autoencoder["decoder"]["config"]["sinusoidal_blocks"] = [2 if shape == "medium" else 0]
    return value


def write_text_encoder(directory: Path, seed: int) -> None:
    """A one-layer T5Gemma encoder of the real width and a tokenizer of bytes, saved as transformers saves them."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    tokenizer = byte_tokenizer()
    half = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN_WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "layer_types": ["full_attention"],
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**half),
        decoder=T5GemmaModuleConfig(**half),
        is_encoder_decoder=False,
        vocab_size=len(tokenizer),
        architectures=["T5GemmaEncoderModel"],
        dtype="float32",
    )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in T5GemmaEncoderModel(config).named_parameters()}
    # Norm weights are offsets from 1; matrices keep the scale of their input.
    tensors = {
        name: uniform(f"{seed}/text/{name}", shape, 0.0, 0.1 if len(shape) == 1 else shape[1] ** -0.5, "cpu")
        for name, shape in shapes.items()
    }
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    value = config.to_dict()
    value.pop("transformers_version", None)
    write_json(directory / "config.json", value)
    tokenizer.save_pretrained(directory)


def byte_tokenizer():
    """One token per byte after id 0, the padding; no BOS or EOS. Needs no corpus and knows every string."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, **{symbol: i for i, symbol in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
