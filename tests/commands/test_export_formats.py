"""Other programs' layouts: read the way those programs read them, they act as the adapter they were made from."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa3dist import cli
from sa3dist.adapters import (
    adapted_layers,
    adapter_parameters,
    detach_adapter,
    load_adapter,
    lora_config,
    read_adapter_file,
)
from sa3dist.model.frequencies import expo_frequencies
from tests.helpers.adapter_files import changes, load, make_adapter, relative
from tests.helpers.diffusers_port import port_of_dit


@pytest.fixture
def base(demo_base):
    return load(demo_base)


def export(*words) -> int:
    return cli.main(["export", *map(str, words)])


def test_help_of_export_tells_its_options(capsys):
    with pytest.raises(SystemExit) as ended:
        export("--help")
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(option in told for option in ("PATH", "--format", "--output", "--base"))


def test_a_run_that_is_not_there_is_no_config_and_what_is_read_is_not_overwritten(base, tmp_path, capsys):
    assert export(tmp_path / "absent") == 2
    assert "absent: no such file or folder; give a run's output_dir" in capsys.readouterr().err
    path = tmp_path / "own.safetensors"
    make_adapter(base, path, 3)
    before = path.read_bytes()
    for words in (["export", path, "--format", "native"], ["merge", path]):
        assert cli.main([*map(str, words), "--output", str(tmp_path / "." / "own.safetensors")]) == 2
        assert f"--output: {path} is one of the inputs" in capsys.readouterr().err
    assert path.read_bytes() == before


def patched_by_comfy(weight, tensors, key):
    """What ComfyUI's generic loader makes of a float32 weight at strength 1, from its documented layout."""
    if f"{key}.diff" in tensors:
        return weight + tensors[f"{key}.diff"].float()
    up, down = (tensors[f"{key}.lora_{part}.weight"].float().flatten(1) for part in ("up", "down"))
    after = weight + (tensors[f"{key}.alpha"].item() / down.shape[0] * up @ down).view(weight.shape)
    if f"{key}.dora_scale" not in tensors:
        return after
    scale = tensors[f"{key}.dora_scale"].float()
    # The axis is told by the first side; on the output axis its norms are of the weight before the update.
    on_rows = scale.shape[0] == weight.shape[0]
    of, axes = (weight, [*range(1, weight.ndim)]) if on_rows else (after, [0, *range(2, weight.ndim)])
    norms = of.pow(2).sum(axes, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
    return after * (scale / norms)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("lora", "comfy"),
        ("dora-rows", "comfy"),
        ("dora-cols", "comfy"),
        ("lora-xs", "comfy"),
        ("dora-rows-xs", "comfy"),
        ("dora-cols-xs", "comfy"),
        ("bora", "comfy-diff"),
        ("bora-xs", "comfy-diff"),
    ],
)
def test_comfy_files_make_the_effective_weights(base, tmp_path, kind, layout):
    # Linear and convolution layers, wide, tall and square.
    include = ["layers.0.", "_conv"]
    path = make_adapter(base, tmp_path / "a.safetensors", 1, adapter_type=kind, rank=4, alpha=6, include=include)
    assert export(path, "--format", layout, "--output", tmp_path / "comfy.safetensors") == 0
    tensors = load_file(tmp_path / "comfy.safetensors")
    load_adapter(base, path)
    layers = adapted_layers(base)
    assert len(layers) == 11
    seen = set()
    for name, layer in layers.items():
        key = f"diffusion_model.{name.removeprefix('model.')}"
        seen |= {found for found in tensors if found.startswith(f"{key}.")}
        before = base.fp32_weight(name)
        expected = layer.effective_weight(before)
        found = patched_by_comfy(before.clone(), tensors, key)
        # comfy-diff rounds the change to float16.
        assert relative(found - before, expected - before) < (1e-3 if layout == "comfy-diff" else 3e-5)
    assert seen == set(tensors)


def test_a_layer_comfyui_cannot_patch_is_refused_or_left_out_by_name(base, tmp_path, capsys):
    path = make_adapter(base, tmp_path / "a.safetensors", 1, adapter_type="dora-cols", rank=2)
    assert export(path, "--format", "comfy") == 2
    assert "conditioners.seconds_total.embedder.embedding.1" in capsys.readouterr().err
    assert export(path, "--format", "comfy", "--without-conditioner") == 0
    assert "without conditioners.seconds_total.embedder.embedding.1" in capsys.readouterr().out
    tensors = load_file(tmp_path / "a.comfy.safetensors")
    assert len({key.partition(".lora_up")[0] for key in tensors if "lora_up" in key}) == 30


@pytest.mark.parametrize("kind", ["lora", "dora-rows", "lora-xs", "dora-rows-xs"])
def test_peft_folders_make_the_port_answer_as_the_adapted_model(base, demo_base, tmp_path, kind):
    peft = pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    path = make_adapter(base, tmp_path / "a.safetensors", 1, adapter_type=kind, rank=4, alpha=6)
    assert export(path, "--format", "diffusers", "--output", tmp_path / "peft") == 0
    port = port_of_dit(base)
    linear = base.conditioner.seconds_total.embedder.embedding[1]
    durations = StableAudio3DurationEmbedder()
    durations.load_state_dict({"linear.weight": linear.weight, "linear.bias": linear.bias}, strict=False)
    # It finds them anew, as this processor does.
    durations.freqs.copy_(expo_frequencies(durations.freqs.device))
    draw = torch.Generator().manual_seed(2)
    x, cross, local = (torch.randn(shape, generator=draw) for shape in ((1, 64, 9), (1, 5, 768), (1, 65, 9)))
    arguments = x, torch.tensor([0.4]), cross

    def answers(transformer, durations):
        seconds = durations(torch.tensor([9.0])).reshape(1, -1)
        return seconds, transformer(*arguments, seconds, local_add_cond=local).sample

    with torch.no_grad():
        plain = answers(port, durations)
        adapted = answers(
            peft.PeftModel.from_pretrained(port, tmp_path / "peft/transformer").base_model.model,
            peft.PeftModel.from_pretrained(durations, tmp_path / "peft/duration_embedder").base_model.model,
        )
        load_adapter(base, path)
        seconds = base.conditioner.seconds_total(torch.tensor([9.0]), torch.float32)[:, 0]
        expected = seconds, base.dit(*arguments, seconds, local)
    for found, wanted, before in zip(adapted, expected, plain, strict=True):
        # -xs types move less than the others do.
        assert relative(before, wanted) > 0.01
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    detach_adapter(base)


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        ("bora", ["--format", "comfy"], "dora_scale is of rows or of columns"),
        ("dora-cols", ["--format", "diffusers"], "PEFT has no adapter for columns"),
        ("dora-rows", ["--format", "comfy", "--base", "nowhere"], "no such directory"),
        ("lora", ["--format", "comfy", "--baked-norms"], "--baked-norms: only for --format native"),
        ("dora-cols", ["--format", "peft"], "PEFT has no adapter for columns"),
    ],
)
def test_what_a_layout_cannot_say_is_refused_in_one_line(base, tmp_path, capsys, kind, words, expected):
    path = make_adapter(base, tmp_path / "a.safetensors", 1, adapter_type=kind, rank=2, include=["layers.0.ff"])
    assert export(path, *words) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.strip().splitlines()) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_without_a_checkpoint_is_no_source(tmp_path, capsys):
    assert export(tmp_path) == 2
    assert "no intact checkpoint here" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--format", "native"], ["--format", "sa3"]])
def test_the_reference_trainers_checkpoint_becomes_a_file_of_our_format(base, tmp_path, words):
    path = make_adapter(base, tmp_path / "a.safetensors", 1, adapter_type="bora", rank=2, include=["layers.0.ff"])
    load_adapter(base, path)
    values = {name: value.detach().clone() for name, value in adapter_parameters(base).items()}
    torch.save({"state_dict": values, "lora_config": lora_config(base)}, tmp_path / "b.ckpt")
    detach_adapter(base)
    assert export(tmp_path / "b.ckpt", *words) == 0
    found, expected = load_file(tmp_path / "b.native.safetensors"), load_file(path)
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == torch.float16 and torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("kind", "layout"), [("dora-rows", "diffusers"), ("dora-rows", "peft"), ("dora-cols", "comfy")]
)
def test_what_another_layout_was_made_from_comes_back(base, demo_base, tmp_path, kind, layout):
    settings = {"adapter_type": kind, "rank": 2, "alpha": 3, "include": ["layers.0.", "_conv"]}
    path = make_adapter(base, tmp_path / "a.safetensors", 1, **settings)
    there, back = tmp_path / ("there.safetensors" if layout == "comfy" else "there"), tmp_path / "back.safetensors"
    assert export(path, "--format", layout, "--output", there) == 0
    assert export(there, "--base", demo_base, "--output", back) == 0
    found, expected = load_file(back), load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_file_that_does_not_say_what_it_is_is_read_as_it_is_told(base, tmp_path, capsys):
    settings = {"adapter_type": "dora-rows", "rank": 2, "alpha": 3, "include": ["layers.0.ff"]}
    path = make_adapter(base, tmp_path / "a.safetensors", 1, **settings)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    assert export(tmp_path / "bare.safetensors") == 2
    assert "--lora-config" in capsys.readouterr().err
    told = '{"rank": 2, "alpha": 3, "adapter_type": "dora-rows", "include": ["layers.0.ff"]}'
    assert export(tmp_path / "bare.safetensors", "--lora-config", told, "--output", tmp_path / "b.safetensors") == 0
    found = read_adapter_file(tmp_path / "b.safetensors")
    assert found.config == read_adapter_file(path).config


def test_the_oracle_of_changes_is_the_adapters_own(base, demo_base, tmp_path):
    path = make_adapter(base, tmp_path / "a.safetensors", 1, adapter_type="bora", rank=2, include=["layers.0.ff"])
    load_adapter(base, path)
    for name, change in changes(demo_base, path).items():
        before = base.fp32_weight(name)
        found = adapted_layers(base)[name].effective_weight(before) - before
        assert relative(found, change) < 1e-4
