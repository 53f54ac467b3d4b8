"""Files that are given as adapters and are no safetensors files: checkpoints are read, all others named in one line."""

import gzip
import json
import pickle
import zipfile

import pytest
import torch
from sa3dist_kernels import ADAPTER_TYPES
from safetensors.torch import load_file, save_file

import sa3dist
from sa3dist import cli, train
from sa3dist.adapters import adapter_parameters, attach_adapter, read_adapter_file, warm_start
from sa3dist.errors import CheckpointError
from tests.helpers.adapter_base import move
from tests.helpers.golden import golden

TYPES = ("lora", "dora-rows", "bora", "dora-cols-xs")


def trained(kind):
    """A tiny base with an adapter of ``kind`` off its initial values."""
    base = sa3dist.load_base(golden("tiny-sa3"), encoder=False)
    attach_adapter(base, adapter_type=kind, rank=4, alpha=6.0, include=["layers.[0-1].ff"], seed=3)
    move(base, 5)
    return base


def lightning(base, **more):
    """What the reference's own trainer saves (spec: section 3 of the adapter format), as Lightning wraps it."""
    values = {name: value.detach().clone() for name, value in adapter_parameters(base).items()}
    return {
        "state_dict": values,
        "lora_config": sa3dist.adapters.lora_config(base),
        "epoch": 3,
        "global_step": 7,
        **more,
    }


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_adapter_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", TYPES)
def test_the_reference_trainers_checkpoint_starts_a_run(kind, zipped, tmp_path):
    base, path = trained(kind), tmp_path / "it's epoch=3-step=7.ckpt"
    torch.save(lightning(base), path, _use_new_zipfile_serialization=zipped)
    fresh = sa3dist.load_base(golden("tiny-sa3"), encoder=False)
    attach_adapter(fresh, adapter_type=kind, rank=4, alpha=6.0, include=["layers.[0-1].ff"], seed=9)
    warm_start(fresh, path)
    for name, value in adapter_parameters(base).items():
        assert torch.equal(adapter_parameters(fresh)[name], value)


@pytest.mark.parametrize(("kind", "axis"), [("dora-rows", 1), ("dora-cols", 0), ("bora", 1)])
def test_magnitudes_of_two_dimensions_are_read_as_one(kind, axis, tmp_path):
    saved, path = lightning(trained(kind)), tmp_path / "old.ckpt"
    flat = saved["state_dict"]
    saved["state_dict"] = {key: v.unsqueeze(axis) if ".magnitude" in key else v for key, v in flat.items()}
    if kind != "bora":
        # What early versions called both.
        saved["lora_config"]["adapter_type"] = "dora"
    torch.save(saved, path)
    file = read_adapter_file(path)
    assert file.config.kind.computes_as(ADAPTER_TYPES[kind])
    assert all(torch.equal(file.tensors[key], value) for key, value in flat.items())


@pytest.mark.parametrize("inside", [True, False], ids=["state_dict", "plain"])
def test_a_checkpoint_without_config_is_a_lora_with_alpha_equal_to_rank(inside, tmp_path):
    path = tmp_path / "adapter.pt"
    values = lightning(trained("lora"))["state_dict"]
    torch.save({"state_dict": values} if inside else values, path)
    file = read_adapter_file(path)
    assert (file.config.adapter_type, file.config.rank, file.config.alpha) == ("lora", 4, 4)
    assert file.tensors.keys() == values.keys()


@pytest.mark.parametrize("kind", ["dora-rows", "bora", "dora-rows-xs"])
def test_magnitudes_without_config_are_refused_with_the_words_that_mend_it(kind, tmp_path):
    path = tmp_path / "adapter.pt"
    torch.save(lightning(trained(kind))["state_dict"], path)
    message = refusal(path)
    assert ".magnitude" in message
    assert "\n" not in message
    given = message.partition("--lora-config '")[2].partition("'")[0]
    assert json.loads(given) == {"rank": 4, "alpha": 4, "adapter_type": kind}
    assert read_adapter_file(path, given).config.adapter_type == kind


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def make(kind, path):
    save_file({"weight": torch.ones(64, 64)}, path)
    whole = path.read_bytes()
    path.unlink()
    if kind == "full model":
        torch.save({"state_dict": {"model.weight": torch.ones(2)}, "epoch": 1}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("out/lora.safetensors", whole)
    elif kind == "folder":
        path.mkdir()
        for name in ("lora.comfy.safetensors", "lora.safetensors"):
            (path / name).write_bytes(whole)
    elif kind == "cut checkpoint":
        torch.save({"state_dict": {}}, path)
        path.write_bytes(path.read_bytes()[:300])
    elif kind != "absent":
        contents = {
            "code": pickle.dumps(Bomb()),
            "page": b"<!doctype html><title>Sign in</title>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "empty": b"",
            "cut data": whole[:-9],
            "cut header": whole[:30],
            "cut length": whole[:5],
            "gzip": gzip.compress(whole),
            "noise": bytes(range(256)) * 4,
            "text": b"not a tensor in sight",
        }
        path.write_bytes(contents[kind])


@pytest.mark.parametrize(
    ("kind", "said"),
    {
        "full model": "is a PyTorch checkpoint without adapter tensors (model.weight), expected an adapter file",
        "code": "is a pickle that torch.load(..., weights_only=True) refuses",
        "list": "is a PyTorch checkpoint without adapter tensors (list)",
        "zip": "is a zip archive; unpack it and give the out/lora.safetensors in it",
        "folder": "is a folder, expected an adapter file; give ",
        "cut checkpoint": "is a zip archive or a PyTorch checkpoint that is cut off",
        "page": "is a web page ('Sign in'); is it a share link?",
        "pointer": "is a Git LFS pointer that stands for the file",
        "empty": "is empty; copy or download it again",
        "cut data": "is cut off: 16455 of 16464 bytes are there",
        "cut header": "is cut off: 30 of 80 bytes are there",
        "cut length": "is cut off after 5 bytes",
        "gzip": "is compressed with gzip; unpack it first",
        "absent": "cannot be read (No such file or directory); check the path",
        "noise": "not a readable safetensors file",
        "text": "not a readable safetensors file",
    }.items(),
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_other_files_are_named_in_one_line(kind, said, suffix, tmp_path):
    path = tmp_path / f"given{suffix}"
    make(kind, path)
    message = refusal(path)
    assert message.startswith(said)
    assert "\n" not in message
    assert kind != "folder" or message.endswith("/lora.safetensors")


@pytest.mark.parametrize("given", ["checkpoint", "PEFT folder"])
def test_a_run_starts_from_another_trainers_adapter(given, demo_base, demo_clips, demo_work, tmp_path):
    path = tmp_path / "epoch=3.ckpt"
    base = sa3dist.load_base(demo_base, encoder=False)
    attach_adapter(base, adapter_type="lora", rank=4, seed=3)
    move(base, 5)
    torch.save(lightning(base), path)
    if given == "PEFT folder":
        assert cli.main(["export", str(path), "--format", "peft", "--output", str(tmp_path / "peft")]) == 0
        path = tmp_path / "peft"
    values = {"audio_data_url": demo_clips, "model": demo_base, "output_dir": tmp_path / "out", "work_dir": demo_work}
    values |= {"adapter_type": "lora", "rank": 4, "base_precision": "fp32", "mixed_precision": "no"}
    values |= {"report": "false", "gradient_checkpointing": "off"}
    values |= {"number_of_steps": 1, "learning_rate": 1e-30, "lora_checkpoint_url": path}
    assert train.main([f"{k}={v}" for k, v in values.items()]) == 0
    for key, value in load_file(tmp_path / "out/lora.safetensors").items():
        assert torch.equal(value, adapter_parameters(base)[key].half())
