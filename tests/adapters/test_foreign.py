"""Files that are given as adapters and are no safetensors files: named, with the lines that convert what can be."""

import gzip
import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import sa3dist
from sa3dist import train
from sa3dist.adapters import adapter_parameters, attach_adapter, read_adapter_file, save_adapter, warm_start
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


def run_lines(message):
    """Execute the Python of a message as a user would, and give the file it names."""
    first, *lines = message.splitlines()
    assert len(lines) == 2
    assert "weights_only=True" in lines[0]
    # In a namespace of their own: they import what they need.
    exec("\n".join(lines), {})
    return first


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", TYPES)
def test_the_two_lines_make_of_the_reference_trainers_checkpoint_a_file_that_starts_a_run(kind, zipped, tmp_path):
    base, path = trained(kind), tmp_path / "it's epoch=3-step=7.ckpt"
    torch.save(lightning(base), path, _use_new_zipfile_serialization=zipped)
    first = run_lines(refusal(path))
    assert first.startswith("is a PyTorch checkpoint, as the reference's own trainer saves it")
    fresh = sa3dist.load_base(golden("tiny-sa3"), encoder=False)
    attach_adapter(fresh, adapter_type=kind, rank=4, alpha=6.0, include=["layers.[0-1].ff"], seed=9)
    warm_start(fresh, path.with_suffix(".safetensors"))
    for name, value in adapter_parameters(base).items():
        assert torch.equal(adapter_parameters(fresh)[name], value)


@pytest.mark.parametrize("kind", ["lora", "dora-rows", "bora", "lora-xs"])
@pytest.mark.parametrize("inside", [True, False], ids=["state_dict", "plain"])
def test_a_checkpoint_without_config_is_converted_with_what_its_shapes_tell(kind, inside, tmp_path):
    base, path = trained(kind), tmp_path / "adapter.pt"
    values = lightning(base)["state_dict"]
    torch.save({"state_dict": values} if inside else values, path)
    first = run_lines(refusal(path))
    assert "once adapter_type and alpha are those it was trained with" in first
    file = read_adapter_file(tmp_path / "adapter.safetensors")
    assert (file.config.adapter_type, file.config.rank, file.config.alpha) == (kind, 4, 4)
    assert file.tensors.keys() == values.keys()


def test_the_lines_never_write_over_a_file_that_is_there(tmp_path):
    base = trained("lora")
    save_adapter(base, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    torch.save(lightning(base), tmp_path / "a.ckpt")
    run_lines(refusal(tmp_path / "a.ckpt"))
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert load_file(tmp_path / "a-converted.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()


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
        (path / "lora.safetensors").write_bytes(whole)
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
        "code": "is a pickle, expected a safetensors file; torch.load(..., weights_only=True) refuses it",
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


def test_a_run_that_is_given_a_checkpoint_says_so_and_ends_with_2(demo_base, demo_clips, demo_work, tmp_path, capfd):
    path = tmp_path / "epoch=3.ckpt"
    torch.save(lightning(trained("lora")), path)
    values = {"audio_data_url": demo_clips, "model": demo_base, "output_dir": tmp_path / "out", "work_dir": demo_work}
    values |= {"adapter_type": "lora", "rank": 4, "base_precision": "fp32", "mixed_precision": "no"}
    assert train.main([f"{k}={v}" for k, v in (values | {"lora_checkpoint_url": path}).items()]) == 2
    said = json.loads((tmp_path / "out/status.json").read_text())["message"]
    assert said.startswith(f"{path}: is a PyTorch checkpoint, as the reference's own trainer saves it")
    assert said in capfd.readouterr().err
