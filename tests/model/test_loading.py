"""Loading a base: strict keys, one-line errors, names through the hub's cache, the text encoder's sources."""

import json
import shutil
from copy import deepcopy
from types import SimpleNamespace

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import sa3dist
from sa3dist.errors import CheckpointError
from sa3dist.model.loading import find_base
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.released import RELEASED, released_config
from sa3dist.model.text import TextEncoder, load_encoder
from sa3dist.model.tiny import TEXT_FOLDER, write_tiny_base
from tests.helpers.golden import TINY_MODELS, golden


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(golden("tiny-sa3"), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("tiny"))


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def change_config(directory, change):
    path = directory / "model_config.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    # Out of the mapped file before it is written over.
    tensors = {key: value.clone() for key, value in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tensor_of_the_file_arrives_in_the_asked_dtype_but_rotary_tables(name):
    base = sa3dist.load_base(golden(name), dtype=torch.bfloat16)
    base.decode_latents(torch.zeros(1, 8, 1))
    file = load_file(golden(f"{name}/model.safetensors"))
    state = base.state_dict()
    assert state.keys() == file.keys()
    for key, value in state.items():
        # SAME stays float32 because its latents are kept; rotary frequencies because positions need them.
        kept = key.endswith("inv_freq") or key.startswith("pretransform.")
        assert value.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(value, file[key].to(value.dtype))


def test_fp32_weights_of_a_bf16_base_come_from_the_file():
    base = sa3dist.load_base(golden("tiny-sa3"), dtype=torch.bfloat16)
    file = load_file(golden("tiny-sa3/model.safetensors"))
    for name, key in (
        ("model.transformer.layers.1.ff.ff.2", "model.model.transformer.layers.1.ff.ff.2.weight"),
        ("model.preprocess_conv", "model.model.preprocess_conv.weight"),
        (
            "conditioners.seconds_total.embedder.embedding.1",
            "conditioner.conditioners.seconds_total.embedder.embedding.1.weight",
        ),
    ):
        assert torch.equal(base.fp32_weight(name), file[key])


def test_digest_identifies_the_file(copy):
    first = sa3dist.load_base(copy).weights_digest()
    assert first == sa3dist.load_base(golden("tiny-sa3")).weights_digest()
    change_tensors(copy, lambda tensors: tensors["model.model.preprocess_conv.weight"].add_(1))
    assert sa3dist.load_base(copy).weights_digest() != first


def test_decoder_and_encoder_are_read_on_first_use_only(copy):
    base = sa3dist.load_base(copy, encoder=False)
    assert not any("pretransform.model.encoder" in key or "decoder" in key for key in base.state_dict())
    latents = base.encode_audio(torch.ones(1, 2, 64))
    assert not any("decoder" in key for key in base.state_dict())
    assert torch.equal(latents, sa3dist.load_base(golden("tiny-sa3")).encode_audio(torch.ones(1, 2, 64)))
    audio = base.decode_latents(latents)
    base.release_encoders()
    assert not any("coder." in key for key in base.state_dict())
    assert torch.equal(audio, base.decode_latents(latents))


def test_missing_unexpected_and_misshapen_tensors_are_named_three_at_most(copy):
    def change(tensors):
        for layer in (0, 1):
            for part in ("weight", "bias"):
                del tensors[f"model.model.transformer.layers.{layer}.ff.ff.2.{part}"]
        tensors["model.model.extra"] = torch.ones(1)
        tensors["model.model.preprocess_conv.weight"] = torch.ones(8, 9, 1)

    change_tensors(copy, change)
    with pytest.raises(CheckpointError) as error:
        sa3dist.load_base(copy)
    message = one_line(error)
    assert "model.safetensors" in message
    assert "4 missing" in message
    assert message.count("ff.ff.2") == 3
    assert "1 unexpected (model.model.extra)" in message
    assert "preprocess_conv.weight is [8, 9, 1], expected [8, 8, 1]" in message


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: shutil.rmtree(d), "no such directory, and not a released base"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: (d / "model_config.json").unlink(), "no model_config.json"),
        (lambda d: (d / "model_config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "model_config.json").write_text("[1]"), "expected an object"),
        (lambda d: (d / "model_config.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda d: (d / "model.safetensors").write_bytes(b"not tensors at all"), "not a readable safetensors file"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "not a readable safetensors file"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "golden.safetensors").read_bytes()), "missing"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-4]),
            "not a readable safetensors file",
        ),
    ],
)
def test_damaged_directories_are_refused_in_one_line(copy, damage, expected):
    damage(copy)
    with pytest.raises(CheckpointError) as error:
        sa3dist.load_base(copy)
    message = one_line(error)
    assert expected in message
    assert str(copy) in message


def dit_section(value):
    return value["model"]["diffusion"]["config"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v["model"].pop("diffusion"), "model.diffusion is missing"),
        (lambda v: v["model"]["diffusion"].pop("diffusion_objective"), "'v' is not supported"),
        (lambda v: dit_section(v).pop("norm_type"), "norm_type is absent, which means 'layer_norm'"),
        (lambda v: dit_section(v).pop("global_cond_type"), "global_cond_type is absent, which means 'prepend'"),
        (lambda v: dit_section(v).update(patch_size=2), "patch_size is 2; only 1 is supported"),
        (lambda v: dit_section(v).update(timestep_features_dim=64), "is 64; only 256 is supported"),
        (lambda v: dit_section(v).update(embed_dim="wide"), "embed_dim is 'wide', expected int"),
        (lambda v: dit_section(v)["attn_kwargs"].update(qk_norm="l2"), "attn_kwargs.qk_norm is 'l2'"),
        (lambda v: dit_section(v).update(num_heads=5), "num_heads"),
        (lambda v: dit_section(v).update(global_cond_dim=16), "cond_dim is 32"),
        (lambda v: v["model"]["diffusion"].update(global_cond_ids=["prompt"]), "global_cond_ids"),
        (lambda v: v["model"]["conditioning"]["configs"].pop(0), "expected prompt: t5gemma"),
        (lambda v: v["model"]["pretransform"]["config"]["encoder"]["config"].update(strides=[4, 2]), "one resampling"),
        (lambda v: v["model"]["pretransform"]["config"].update(downsampling_ratio=64), "downsampling_ratio"),
        (lambda v: v.update(sample_rate=0), "sample_rate is 0, expected a positive integer"),
        (lambda v: dit_section(v).update(depth=3), "missing"),
    ],
)
def test_unsupported_configs_are_refused_by_key(copy, change, expected):
    change_config(copy, change)
    with pytest.raises(CheckpointError) as error:
        sa3dist.load_base(copy)
    assert expected in one_line(error)


def test_inert_keys_are_ignored_and_absent_ones_mean_their_defaults(copy):
    def change(value):
        value["training"] = {"anything": 1}
        dit_section(value)["some_future_flag"] = True
        dit_section(value)["ff_kwargs"].pop("mult")

    change_config(copy, change)
    config = parse_model_config(json.loads((copy / "model_config.json").read_text()), "here")
    assert config.dit.ff_kwargs.mult == 4
    assert config.dit.norm_kwargs.eps == 1e-5
    assert config.dit.attn_kwargs.qk_norm_eps == 1e-6
    assert config.autoencoder.encoder.dyt is True


@pytest.mark.parametrize(("name", "seconds"), [("medium-base", 380), ("small-music-base", 120)])
def test_native_length_of_a_released_base(name, seconds):
    assert parse_model_config(released_config(name), name).native_seconds == seconds


@pytest.mark.parametrize(
    ("name", "tensors", "values"), [("medium-base", 997, 2_305_495_793), ("small-sfx-base", 685, 567_573_761)]
)
def test_released_configs_imply_the_published_inventories(name, tensors, values):
    from math import prod

    from sa3dist.model.loading import expected_tensors

    shapes = expected_tensors(parse_model_config(released_config(name), name))
    assert (len(shapes), sum(map(prod, shapes.values()))) == (tensors, values)


def test_a_stand_alone_autoencoder_is_refused_as_one(copy):
    change_config(copy, lambda v: v.update(model=v["model"]["pretransform"]["config"]))
    with pytest.raises(CheckpointError, match="a stand-alone autoencoder, expected a diffusion model"):
        sa3dist.load_base(copy)


def fill_cache(root, repo_id, source):
    """Lay out a hub cache as a finished download leaves it."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = root / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    shutil.copytree(source, repo / "snapshots" / revision)
    return repo / "snapshots" / revision


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache of our own, in offline mode."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_released_name_loads_from_the_cache_with_the_base_repositorys_text_encoder(cache, tiny):
    repo_id = RELEASED["medium-base"]
    snapshot = fill_cache(cache, repo_id, tiny)
    # The config points at the post-trained twin, which is gated separately and not here.
    change_config(
        snapshot,
        lambda v: v["model"]["conditioning"]["configs"][0]["config"].update(repo_id=repo_id.removesuffix("-base")),
    )
    base = sa3dist.load_base("medium-base")
    embeds, _ = base.encode_prompts(["a bass drum"])
    expected, _ = sa3dist.load_base(tiny).encode_prompts(["a bass drum"])
    assert torch.equal(embeds, expected)


def test_released_name_that_is_not_cached_explains_offline_mode(cache):
    with pytest.raises(CheckpointError) as error:
        sa3dist.load_base("small-music-base")
    message = one_line(error)
    assert "stabilityai/stable-audio-3-small-music-base" in message
    assert "model=/path" in message


def test_half_cached_text_encoder_is_not_mistaken_for_a_whole_one(cache, tiny):
    snapshot = fill_cache(cache, RELEASED["medium-base"], tiny)
    (snapshot / TEXT_FOLDER / "tokenizer_config.json").unlink()
    base = sa3dist.load_base("medium-base")
    with pytest.raises(CheckpointError) as error:
        base.encode_prompts(["a"])
    assert "text_encoder=/path" in one_line(error)


def gated(*_, **options):
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    if options.get("local_files_only"):
        raise LocalEntryNotFoundError("not here")
    response = SimpleNamespace(status_code=403, headers={}, request=None)
    raise GatedRepoError("403 Client Error\n\nCannot access gated repo", response=response)


def test_gated_repository_says_to_accept_the_licence_and_log_in(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    with pytest.raises(CheckpointError) as error:
        find_base("medium-base")
    message = one_line(error)
    assert "https://huggingface.co/stabilityai/stable-audio-3-medium-base" in message
    assert "hf auth login" in message


def test_unreachable_hub_says_so(monkeypatch):
    def unreachable(*_, **options):
        from huggingface_hub.errors import LocalEntryNotFoundError

        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(CheckpointError) as error:
        find_base("medium-base")
    assert "the hub cannot be reached (Name or service not known second line)" in one_line(error)


def test_directory_without_text_encoder_serves_everything_else_and_takes_an_override(tiny, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model_config.json", "model.safetensors"):
        shutil.copy(tiny / name, bare)
    base = sa3dist.load_base(bare, text_encoder=tiny)
    assert base.encode_audio(torch.zeros(1, 2, 5)).shape[2] == 1
    expected = sa3dist.load_base(tiny).encode_prompts(["drum"])[0]
    assert torch.equal(base.encode_prompts(["drum"])[0], expected)
    direct = sa3dist.load_base(bare, text_encoder=tiny / TEXT_FOLDER)
    assert torch.equal(direct.encode_prompts(["drum"])[0], expected)
    with pytest.raises(CheckpointError, match="config.json"):
        sa3dist.load_base(bare, text_encoder=bare).encode_prompts(["drum"])
    with pytest.raises(CheckpointError, match="no such directory"):
        sa3dist.load_base(bare, text_encoder="/nowhere/at/all").encode_prompts(["drum"])


def test_padded_prompt_tokens_change_no_hidden_state(tiny):
    """The fixed length is padding only: a token's hidden state is what the prompt gives without any."""
    base = sa3dist.load_base(tiny)
    hidden, mask = base.encode_hidden(["a bass drum", "hi"])
    text = TextEncoder(base.text_source, "cpu")
    for row, prompt in enumerate(("a bass drum", "hi")):
        ids = text.tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = text.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(hidden[row][mask[row]], alone, atol=1e-5, rtol=1e-5)


def test_text_encoder_stays_outside_the_module_tree(tiny):
    base = sa3dist.load_base(tiny)
    before = set(base.state_dict())
    base.encode_prompts(["drum"])
    assert set(base.state_dict()) == before


def full_t5gemma(directory, dtype):
    """An encoder-decoder checkpoint, as the released folder holds it, and the model transformers reads from it."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

    half = {
        "vocab_size": 257,
        "hidden_size": 768,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = T5GemmaConfig(encoder=T5GemmaModuleConfig(**half), decoder=T5GemmaModuleConfig(**half), vocab_size=257)
    model = T5GemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory)
    return T5GemmaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")


def test_encoder_of_a_whole_bf16_t5gemma_is_loaded_completely_in_its_dtype(tmp_path):
    whole = full_t5gemma(tmp_path, torch.bfloat16)
    encoder = load_encoder(tmp_path)
    ids = torch.randint(1, 257, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = whole.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    ours = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected)
    # SDPA would leave out the soft cap.
    assert encoder.config._attn_implementation == "eager"


def test_text_encoder_with_missing_weights_is_refused_not_filled_at_random(tiny, tmp_path):
    shutil.copytree(tiny / TEXT_FOLDER, tmp_path / "text")
    tensors = {key: value.clone() for key, value in load_file(tmp_path / "text" / "model.safetensors").items()}
    del tensors["encoder.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "text" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight"):
        load_encoder(tmp_path / "text")


def test_a_load_opens_its_file_once_and_the_base_can_still_be_copied(monkeypatch):
    opened = []
    open_file = safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *given, **how: opened.append(given) or open_file(*given, **how)
    )
    base = sa3dist.load_base(golden("tiny-sa3"))
    assert len(opened) == 1
    twin = deepcopy(base)
    layer = "model.transformer.layers.0.self_attn.to_qkv"
    assert torch.equal(twin.fp32_weight(layer), base.fp32_weight(layer))
    assert len(opened) == 2
