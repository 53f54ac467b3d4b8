"""`sa3dist verify`: every layer of a good file lands in its program; what is damaged is counted and named."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sa3dist import cli
from sa3dist.adapters import landing_peft
from sa3dist.commands import verify as commands_verify
from tests.helpers.adapter_files import SLOT, load, make_adapter

INCLUDE = ["layers.0.", "_conv", "conditioners", "to_cond_embed"]


@pytest.fixture(scope="module")
def base(demo_base):
    return load(demo_base)


@pytest.fixture
def adapter(base, tmp_path):
    return lambda kind, **more: make_adapter(
        base, tmp_path / "a.safetensors", 1, **{"adapter_type": kind, "rank": 4, "alpha": 6, "include": INCLUDE, **more}
    )


def run(capfd, command, *words):
    """(exit code, lines of stdout, stderr)"""
    code = cli.main([command, *map(str, words)])
    out, err = capfd.readouterr()
    return code, out.splitlines(), err


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)


@pytest.mark.parametrize(
    ("kind", "layout", "target", "layers"),
    [
        ("bora", "native", "native", 14),
        ("dora-rows-xs", "native", "native", 14),
        ("lora", "peft", "peft", 14),
        ("dora-rows", "peft", "peft", 14),
        ("lora", "diffusers", "diffusers", 14),
        ("dora-rows", "diffusers", "diffusers", 14),
        ("dora-rows", "comfy", "comfy", 13),
        ("dora-cols", "comfy", "comfy", 13),
        ("bora", "comfy-diff", "comfy", 13),
        ("dora-cols-xs", "merged", "merged", 14),
    ],
)
def test_what_export_writes_lands_whole_and_is_verified_as_it_is_written(
    adapter, tmp_path, capfd, kind, layout, target, layers
):
    path, output = adapter(kind), tmp_path / ("out" if layout in ("peft", "diffusers", "merged") else "out.safetensors")
    code, lines, err = run(capfd, "export", path, "--format", layout, "--output", output, "--without-conditioner")
    assert (code, lines[-1]) == (0, f"{layers}/{layers} layers land"), err
    equal = "effective weights: equal to the adapter's"
    assert lines[-2] == equal or lines[-2].startswith("effective weights: differ from the adapter's by at most ")
    against = ["--against", path] if layers == 14 else []
    code, lines, err = run(capfd, "verify", output, "--for", target, *against)
    assert (code, lines[-1]) == (0, f"{layers}/{layers} layers land"), err


def test_a_native_file_is_not_loaded_by_comfyui_and_that_is_said(adapter, capfd):
    code, lines, err = run(capfd, "verify", adapter("lora"), "--for", "comfy")
    assert (code, lines[-1]) == (2, "0/14 layers land")
    assert "is no layer that ComfyUI knows: not loaded" in err
    assert err.endswith("; the file is of another format, or of another base\n")


def test_what_is_of_another_kind_is_refused_in_one_line(adapter, capfd):
    path = adapter("lora")
    for target, said in (("merged", "is no directory of a base"), ("peft", "is no PEFT folder")):
        code, _, err = run(capfd, "verify", path, "--for", target)
        assert code == 2
        assert err.startswith(f"{path}: {said}")
        assert len(err.splitlines()) == 1


def damaged_name(tensors):
    # Without its alpha a ComfyUI layer is another one, but whole.
    ours = [key for key in tensors if "layers.0.ff.ff.2" in key or "blocks.0.ff.proj_out" in key]
    key = next(key for key in ours if not key.endswith("alpha"))
    tensors[key.replace("s.0.ff", "s.0.fff")] = tensors.pop(key)


def damaged_shape(tensors):
    key = next(
        key for key in tensors if "cross_attn.to_q." in key and key.endswith(("lora_B", "lora_B.weight", "up.weight"))
    )
    tensors[key] = tensors[key][:-1]


@pytest.mark.parametrize("damage", [damaged_name, damaged_shape])
@pytest.mark.parametrize("layout", ["native", "peft", "diffusers", "comfy"])
def test_one_damaged_key_is_counted_and_named(adapter, tmp_path, capfd, layout, damage):
    if layout == "diffusers":
        pytest.importorskip("diffusers")
    path = adapter("lora", exclude=["conditioners"])
    folder = {"peft": "out", "diffusers": "out/transformer"}.get(layout)
    output = tmp_path / ("out" if folder else "out.safetensors")
    assert run(capfd, "export", path, "--format", layout, "--output", output)[0] == 0
    rewrite(tmp_path / folder / "adapter_model.safetensors" if folder else output, damage)
    for against in ([], ["--against", path]):
        code, lines, err = run(capfd, "verify", output, "--for", layout, *against)
        assert code == 2
        # A renamed key may be counted as a layer of its own.
        assert lines[-1] in ("12/13 layers land", "12/14 layers land")
        assert "ff" in err if damage is damaged_name else "cross_attn.to_q" in err


def wrong_alpha(tensors):
    for key in tensors:
        if key.endswith("alpha"):
            tensors[key] = tensors[key] * 1.1


def test_a_file_whose_keys_all_land_but_act_otherwise_is_refused(adapter, tmp_path, capfd):
    path, output = adapter("lora", exclude=["conditioners"]), tmp_path / "out.safetensors"
    assert run(capfd, "export", path, "--format", "comfy", "--output", output)[0] == 0
    rewrite(output, wrong_alpha)
    # By itself it is a sound file of another scale.
    assert run(capfd, "verify", output, "--for", "comfy")[1][-1] == "13/13 layers land"
    code, lines, err = run(capfd, "verify", output, "--for", "comfy", "--against", path)
    assert (code, lines[-1]) == (2, "0/13 layers land")
    assert "acts otherwise than the adapter: by 0.1 of its change" in err


def test_a_merged_base_with_a_layer_that_was_not_merged_is_refused(adapter, demo_base, tmp_path, capfd):
    path, output = adapter("dora-rows"), tmp_path / "merged"
    assert run(capfd, "export", path, "--format", "merged", "--output", output)[0] == 0
    key = "model.model.transformer.layers.0.ff.ff.2.weight"
    before = load_file(demo_base / "model.safetensors")[key]
    rewrite(output / "model.safetensors", lambda tensors: tensors.update({key: before}))
    for against in ([], ["--against", path]):
        code, lines, err = run(capfd, "verify", output, "--for", "merged", *against)
        assert (code, lines[-1]) == (2, "13/14 layers land")
        assert "model.transformer.layers.0.ff.ff.2: acts" in err


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rounding_to_a_merged_bases_own_format_is_no_difference(adapter, demo_base, tmp_path, capfd, scale):
    half = tmp_path / "half"
    shutil.copytree(demo_base, half)
    rewrite(half / "model.safetensors", lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    path, output = adapter("lora"), tmp_path / "merged"
    rewrite(path, lambda t: t.update({key: t[key] * scale for key in list(t) if key.endswith("lora_B")}))
    code, lines, err = run(capfd, "export", path, "--format", "merged", "--base", half, "--output", output)
    assert (code, lines[-1]) == (0, "14/14 layers land"), err


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_without_the_loader_the_documented_rule_decides(adapter, tmp_path, capfd, monkeypatch, layout):
    path, output = adapter("dora-rows"), tmp_path / "out"
    monkeypatch.setattr(landing_peft, "installed", lambda *packages: False)
    code, lines, _ = run(capfd, "export", path, "--format", layout, "--output", output)
    assert (code, lines[-1]) == (0, "14/14 layers land")


def test_a_base_that_is_not_at_hand_is_said_and_the_file_is_there(adapter, tmp_path, capfd):
    path, output = adapter("lora", exclude=["conditioners"]), tmp_path / "out.safetensors"
    with safe_open(path, "pt") as file:
        config = file.metadata()["lora_config"]
    save_file(load_file(path), path, {"lora_config": config})
    code, lines, err = run(capfd, "export", path, "--format", "comfy", "--output", output)
    assert (code, lines) == (0, [f"wrote {output}"])
    assert f"not verified over a base it does not name: sa3dist verify {output} --for comfy --base MODEL" in err
    assert "names no base model; give it with --base MODEL" in run(capfd, "verify", output, "--for", "comfy")[2]


def test_a_file_whose_base_is_not_here_is_refused_with_the_option_to_give_it(adapter, tmp_path, capfd):
    path, moved = adapter("lora"), tmp_path / "moved" / "a.safetensors"
    moved.parent.mkdir()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    # As in every file of a run: the name of the folder, and no config.json beside the file that says where it is.
    save_file(load_file(path), moved, {**metadata, "base_model": "some-base"})
    said = "its base is called 'some-base', which is no released base and no directory here; give the base with "
    for command, option in (
        (["verify", moved, "--for", "native"], "--base DIRECTORY"),
        (["health", moved], "--base DIRECTORY"),
        (["export", moved, "--format", "comfy-diff", "--without-conditioner"], "--base DIRECTORY"),
        (
            ["generate", "--adapter", moved, "--prompt", "x", "--seconds", "1", "--output", tmp_path],
            "--model DIRECTORY",
        ),
    ):
        code, _, err = run(capfd, *command)
        assert (code, err.splitlines()) == (2, [f"{moved}: {said}{option}"])
    # The adapter that it was made from names a base that is here.
    code, lines, err = run(capfd, "verify", moved, "--for", "native", "--against", path)
    assert (code, lines[-1]) == (0, "14/14 layers land"), err


@pytest.mark.parametrize("kind", ["dora-rows", "bora", "dora-rows-xs"])
def test_baked_norms_are_those_of_the_sum_and_the_file_still_loads(base, adapter, tmp_path, capfd, kind):
    from sa3dist.adapters import adapted_layers, detach_adapter, load_adapter

    path = adapter(kind)
    code, lines, err = run(capfd, "export", path, "--baked-norms")
    output = tmp_path / "a.normbaked.safetensors"
    assert (code, lines[-1]) == (0, "14/14 layers land"), err
    tensors = load_file(output)
    norms = {key.partition(f".{SLOT}")[0]: value for key, value in tensors.items() if key.endswith("baked_vnorm_row")}
    with safe_open(output, "pt") as file:
        config = json.loads(file.metadata()["lora_config"])
    assert config["baked_norms"] == len(norms) == 14
    assert config["norm_base"] == base.weights.path.parent.name
    assert {key: value for key, value in tensors.items() if "baked" not in key}.keys() == load_file(path).keys()
    load_adapter(base, output)
    for name in adapted_layers(base):
        assert norms[name].dtype == torch.float32
        if kind == "dora-rows":
            tensors_of = {part: tensors[f"{name}.{SLOT}.{part}"].double() for part in ("lora_A", "lora_B")}
            whole = base.fp32_weight(name).flatten(1).double() + 1.5 * tensors_of["lora_B"] @ tensors_of["lora_A"]
            torch.testing.assert_close(norms[name].double(), whole.norm(dim=1), rtol=1e-5, atol=1e-7)
    detach_adapter(base)


def test_norms_of_another_base_are_found(base, adapter, tmp_path, capfd):
    run(capfd, "export", adapter("dora-rows"), "--baked-norms")
    output = tmp_path / "a.normbaked.safetensors"
    rewrite(output, lambda t: t.update({key: t[key] * 1.05 for key in list(t) if "ff.ff.2" in key and "baked" in key}))
    code, lines, err = run(capfd, "verify", output, "--for", "native")
    assert (code, lines[-1]) == (2, "13/14 layers land")
    assert "model.transformer.layers.0.ff.ff.2: acts otherwise than the adapter" in err


@pytest.mark.parametrize("kind", ["lora", "dora-cols"])
def test_types_without_rows_have_no_norms_to_bake(adapter, capfd, kind):
    code, _, err = run(capfd, "export", adapter(kind), "--baked-norms")
    assert code == 2
    assert f"--baked-norms are of rows, which {kind} does not divide" in err


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path, capsys):
    assert commands_verify.main([str(tmp_path / "nowhere.safetensors"), "--for", "native"]) == 2
    assert "nowhere.safetensors: no such file or folder" in capsys.readouterr().err


def test_a_runs_folder_is_verified_by_its_adapter(adapter, tmp_path, capfd):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(adapter("lora"), run_dir / "lora.safetensors")
    code, lines, err = run(capfd, "verify", run_dir, "--for", "native")
    assert (code, lines[-2:]) == (0, ["effective weights: equal to the adapter's", "14/14 layers land"]), err
    code, _, err = run(capfd, "health", tmp_path / "nowhere")
    assert (code, err) == (
        2,
        f"{tmp_path}/nowhere: no such file or folder; give a run's output_dir, a checkpoint or an adapter\n",
    )
