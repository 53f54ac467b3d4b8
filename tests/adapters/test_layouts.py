"""Adapters of other trainers act as the same adapter in our own format, or are refused by the key in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa3dist.adapters import (
    adapter_parameters,
    attach_adapter,
    detach_adapter,
    effective_weight,
    load_adapter,
    read_adapter_file,
    warm_start,
)
from sa3dist.adapters.layouts import LAYERS, native_name
from sa3dist.errors import CheckpointError
from tests.helpers.adapter_files import SLOT, load, make_adapter, relative

INCLUDE = ["layers.1.", "_conv", "conditioners", "to_cond_embed"]
QKV = "model.transformer.layers.1.self_attn.to_qkv"
# q, k, v, q', k' of ours are q, q', k, k', v of the port's.
PORT_ORDER = (0, 3, 1, 4, 2)


@pytest.fixture(scope="module")
def base(demo_base):
    return load(demo_base)


def made(base, path, kind):
    """A file of ours, and its layers: name -> tensors."""
    path = make_adapter(base, path, 1, adapter_type=kind, rank=4, alpha=6, include=INCLUDE)
    layers = {}
    for key, value in load_file(path).items():
        name, _, tensor = key.partition(f".{SLOT}.")
        layers.setdefault(name, {})[tensor] = value
    return path, layers


def weights(base, path):
    load_adapter(base, path)
    found = {
        name: effective_weight(base, name) for name in {k.partition(f".{SLOT}")[0] for k in adapter_parameters(base)}
    }
    detach_adapter(base)
    return found


def peft_folder(folder, tensors, **config):
    folder.mkdir(parents=True)
    save_file(
        {f"base_model.model.{key}": value.contiguous() for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, **config}))
    return folder


def as_comfy(layers, path, spelled, up="lora_up", down="lora_down"):
    tensors = {}
    for name, held in layers.items():
        key = spelled(name)
        tail = (1,) if name.endswith("_conv") else ()
        tensors[f"{key}.{up}.weight"] = held["lora_B"].reshape(*held["lora_B"].shape, *tail)
        tensors[f"{key}.{down}.weight"] = held["lora_A"].reshape(*held["lora_A"].shape, *tail)
        tensors[f"{key}.alpha"] = torch.tensor(6.0)
        if "magnitude" in held:
            tensors[f"{key}.dora_scale"] = held["magnitude"].reshape(1, -1, *tail)
    save_file(tensors, path)
    return path


def dotted(name):
    return f"diffusion_model.{name.removeprefix('model.')}"


def flat(name):
    return f"lora_unet_{name.removeprefix('model.').replace('.', '_')}"


@pytest.mark.parametrize("kind", ["lora", "dora-cols"])
@pytest.mark.parametrize("spelled", [dotted, flat])
def test_comfyui_and_kohya_files_act_as_the_adapter_they_hold(base, tmp_path, kind, spelled):
    path, layers = made(base, tmp_path / "a.safetensors", kind)
    expected, found = weights(base, path), weights(base, as_comfy(layers, tmp_path / "other.safetensors", spelled))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("leading", [True, False], ids=["model.", "bare"])
@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
def test_peft_folders_under_our_names_act_as_the_adapter_they_hold(base, tmp_path, kind, leading):
    path, layers = made(base, tmp_path / "a.safetensors", kind)
    tensors = {}
    for name, held in layers.items():
        spelled = name if leading else name.removeprefix("model.")
        tensors |= {f"{spelled}.{part}.weight": held[part] for part in ("lora_A", "lora_B")}
        if "magnitude" in held:
            tensors[f"{spelled}.lora_magnitude_vector.weight"] = held["magnitude"]
    folder = peft_folder(tmp_path / "peft", tensors, use_dora=kind != "lora")
    expected = weights(base, path)
    for given in (folder, folder / "adapter_model.safetensors"):
        found = weights(base, given)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert all(torch.equal(value, expected[name]) for name, value in weights(base, folder).items())


def test_rows_of_diffusers_port_come_back_in_our_order(base, tmp_path):
    path, layers = made(base, tmp_path / "a.safetensors", "dora-rows")
    held = layers[QKV]
    port = {key: torch.cat([value.chunk(5)[i] for i in PORT_ORDER]) for key, value in held.items() if key != "lora_A"}
    name = "transformer_blocks.1.self_attn.to_qkv"
    tensors = {f"{name}.lora_A.weight": held["lora_A"], f"{name}.lora_B.weight": port["lora_B"]}
    peft_folder(tmp_path / "p/transformer", {**tensors, f"{name}.lora_magnitude_vector": port["magnitude"]})
    duration = layers["conditioners.seconds_total.embedder.embedding.1"]
    tensors = {f"linear.{part}.weight": duration[part] for part in ("lora_A", "lora_B")}
    peft_folder(tmp_path / "p/duration_embedder", {**tensors, "linear.lora_magnitude_vector": duration["magnitude"]})
    expected, found = weights(base, path), weights(base, tmp_path / "p")
    assert found.keys() == {QKV, "conditioners.seconds_total.embedder.embedding.1"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_ranks_and_alphas_that_differ_from_layer_to_layer_are_kept_exactly(base, tmp_path):
    draw = torch.Generator().manual_seed(1)
    first, second = "transformer.layers.0.ff.ff.2", "transformer.layers.1.ff.ff.2"
    tensors, changes = {}, {}
    for name, rank, scale in ((first, 2, 5 / 2**0.5), (second, 3, 7 / 3**0.5)):
        fan_out, fan_in = base.fp32_weight(f"model.{name}").shape
        down, up = torch.randn(rank, fan_in, generator=draw), torch.randn(fan_out, rank, generator=draw)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        changes[f"model.{name}"] = scale * up.double() @ down.double()
    folder = peft_folder(
        tmp_path / "p", tensors, r=2, lora_alpha=5, use_rslora=True, alpha_pattern={r"layers\.1\.ff\.ff\.2": 7}
    )
    file = read_adapter_file(folder)
    assert (file.config.rank, file.config.alpha, file.config.adapter_type) == (3, 3, "lora")
    for name, weight in weights(base, folder).items():
        assert relative(weight - base.fp32_weight(name), changes[name]) < 1e-4


def test_a_run_is_started_from_another_trainers_file_of_the_same_layers(base, tmp_path):
    path, layers = made(base, tmp_path / "a.safetensors", "lora")
    other = as_comfy(layers, tmp_path / "other.safetensors", flat)
    attach_adapter(base, "lora", rank=4, alpha=6, include=INCLUDE)
    warm_start(base, other)
    recorded = load_file(path)
    assert all(torch.equal(value.half(), recorded[key]) for key, value in adapter_parameters(base).items())
    detach_adapter(base)
    attach_adapter(base, "lora", rank=4, alpha=6)
    with pytest.raises(CheckpointError, match="include is .* in the file, None in the attached"):
        warm_start(base, other)
    detach_adapter(base)


def test_every_layer_is_known_by_every_spelling_and_block(base):
    from sa3dist.adapters.peft_format import port_name
    from sa3dist.adapters.select import candidate_layers

    names = list(candidate_layers(base.adapter_roots))
    assert {name.replace("layers.1.", "layers.0.").replace("layers.2.", "layers.0.") for name in names} <= set(LAYERS)
    for name in names:
        assert native_name(dotted(name)) == native_name(flat(name)) == native_name(f"base_model.model.{name}") == name
        assert native_name(f"base_model.model.{port_name(name)[1]}") == name
    assert native_name("lora_unet_transformer_layers_23_ff_ff_0_proj") == "model.transformer.layers.23.ff.ff.0.proj"
    assert native_name("lora_unet_down_blocks_0_attentions_0_proj_in") is None


GOOD = {
    "diffusion_model.preprocess_conv.lora_up.weight": (4, 2),
    "diffusion_model.preprocess_conv.lora_down.weight": (2, 4),
}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": (4, 2)},
            "attentions_0_proj_in.lora_up.weight is of no layer of Stable Audio 3; is this another model's adapter?",
        ),
        (
            {"lora_unet_preprocess_conv.lora_up.weight": (4, 2)},
            "lora_unet_preprocess_conv.lora_up.weight is of a layer that is there already",
        ),
        (
            {"diffusion_model.postprocess_conv.lora_up.weight": (4, 2)},
            "there is diffusion_model.postprocess_conv.lora_up.weight, but no lora_down of that layer",
        ),
        ({"diffusion_model.preprocess_conv.lora_up.weight": (4, 3)}, "expected (out, rank), (rank, in) and one number"),
        ({"diffusion_model.preprocess_conv.alpha": (2,)}, "diffusion_model.preprocess_conv.alpha [2]; expected"),
        (
            {"diffusion_model.preprocess_conv.dora_scale": (4, 1, 1)},
            "diffusion_model.preprocess_conv.dora_scale is of rows, which ComfyUI divides by the norms of the base",
        ),
        ({"diffusion_model.postprocess_conv.diff": (4, 4)}, "postprocess_conv.diff is the whole change of a weight"),
        (
            {"diffusion_model.postprocess_conv.hada_w1_a": (4, 2)},
            "postprocess_conv.hada_w1_a is no tensor of a LoRA or DoRA",
        ),
        (
            {"base_model.model.proj_in.lora_A.weight": (2, 4), "base_model.model.proj_in.lora_B.weight": (4, 2)},
            "proj_in.lora_A.weight is PEFT's, but adapter_config.json is not next to it; put it there",
        ),
        (
            {
                "lora_unet_postprocess_conv.lora_up.weight": (4, 2),
                "lora_unet_postprocess_conv.lora_down.weight": (2, 4),
                "lora_unet_postprocess_conv.dora_scale": (1, 4),
            },
            "model.preprocess_conv is lora but model.postprocess_conv is dora-cols; an adapter is of one type here",
        ),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused_by_its_key(tmp_path, more, said):
    path = tmp_path / "a.safetensors"
    save_file({key: torch.ones(shape) for key, shape in {**GOOD, **more}.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        read_adapter_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_peft_config_of_another_method_is_refused(tmp_path):
    folder = peft_folder(tmp_path / "p", {"proj_in.lora_A.weight": torch.ones(2, 4)}, peft_type="LOHA")
    with pytest.raises(CheckpointError, match="adapter_config.json: describes no LoRA"):
        read_adapter_file(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json: is no JSON"):
        read_adapter_file(folder)
